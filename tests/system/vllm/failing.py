"""Run by vLLM's Python: ends well if a call that fails leaves nothing but NaN in its batch, all ranks' rows."""

from types import SimpleNamespace
from unittest import mock

import torch

from expertd.client.integrations.vllm import calls
from expertd.proto.base.errors import Unavailable


class Lost:
    """A call of which nothing comes."""

    def result(self) -> None:
        raise Unavailable("no server can be reached")


def main() -> None:
    method, pass_ = SimpleNamespace(), SimpleNamespace(additional_kwargs={})
    calls._open[1] = calls._Open(method, Lost(), slice(4, 8))  # type: ignore[arg-type]
    with mock.patch.object(calls, "get_forward_context", return_value=pass_):
        combined = calls._combine(torch.tensor(1), torch.zeros(8, 3))
    assert combined.isnan().all(), combined


if __name__ == "__main__":
    main()
