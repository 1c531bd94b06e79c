"""Coverage-guided fuzzing of what reads messages, on both ends: nothing but errors of the project may come out.

python -m tests.chaos.fuzz_codec -atheris_runs=100000 [folder of found inputs]
"""

from __future__ import annotations

import contextlib
import sys

import atheris

with atheris.instrument_imports(include=["expertd.proto"]):
    from expertd.proto import codec
    from expertd.proto.base.errors import ExpertdError

import torch
from google.protobuf.message import DecodeError

from tests.support.model.messages import decode_call
from tests.support.model.requests import parse_request

WIDTH, TOP_K, MAX_TOKENS = 256, 4, 8


def read(data: bytes) -> None:
    """Read `data` as every message that a server or a client receives."""
    for reader in (_as_request, _as_response, codec.ShardRequest.FromString):
        with contextlib.suppress(ExpertdError, DecodeError):
            reader(data)


def _as_request(data: bytes) -> None:
    call = decode_call(parse_request(data), WIDTH, TOP_K, MAX_TOKENS)
    assert call.hidden.shape == (len(call.expert_ids), WIDTH)


def _as_response(data: bytes) -> None:
    result = codec.decode_result(codec.parse_response(data), 2, WIDTH, torch.float32)
    assert result.partials.shape == (2, WIDTH)


if __name__ == "__main__":
    atheris.Setup(sys.argv, read)
    atheris.Fuzz()
