"""Which way calls of transformers' models go where their GPU's stream cannot take them."""

from __future__ import annotations

import pytest
import torch

from expertd.client.integrations.huggingface_streams import Streams
from expertd.proto.base.errors import ExpertdError, InvalidBatch, NotPermitted, Overloaded


class Refusing:
    """A coordinator that cannot be prepared."""

    def __init__(self, error: ExpertdError) -> None:
        self.asked = 0
        self._error = error

    def prepare_stream(self, *_: object) -> None:
        self.asked += 1
        raise self._error


class OnGpu:
    """Hidden states on a GPU that need not be there."""

    is_cuda = True
    device = torch.device("cuda", 0)

    def __len__(self) -> int:
        return 1


@pytest.mark.parametrize("kind", [NotPermitted, InvalidBatch, Overloaded])
def test_they_go_another_way_for_good_where_a_server_refuses(kind: type[ExpertdError]) -> None:
    moe = Refusing(kind("no"))
    streams = Streams(moe, 8)  # type: ignore[arg-type]
    for _ in range(2):
        assert streams.side(OnGpu()) is None  # type: ignore[arg-type]
    assert moe.asked == 1
