"""Run by vLLM's Python: ends well if layers of the same name, of two engines in a process, call each its own fleet."""

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from expertd.client.integrations.vllm import calls

NAME = "model.layers.1.mlp.experts"


class Fleet:
    """Notes that it was called."""

    def __init__(self) -> None:
        self.layers: list[int] = []

    def submit(self, layer: int, *_: Tensor) -> None:
        self.layers.append(layer)


def passing(fleet: Fleet, layer: int) -> Any:  # noqa: ANN401
    """The context of a pass of an engine whose layer calls `fleet`."""
    method = SimpleNamespace(fleet=fleet, layer=layer, rank=0, ranks=1)
    runner = SimpleNamespace(routed_experts=SimpleNamespace(quant_method=method))
    metadata = {NAME: SimpleNamespace(num_actual_tokens=2)}
    return SimpleNamespace(no_compile_layers={NAME: runner}, attn_metadata=metadata, additional_kwargs={})


def main() -> None:
    first, second = Fleet(), Fleet()
    for of in (passing(first, 1), passing(second, 2), passing(first, 1)):
        with mock.patch.object(calls, "get_forward_context", return_value=of):
            calls.dispatch(torch.zeros(2, 3), torch.zeros(2, 1), torch.zeros(2, 1).int(), NAME)
    assert (first.layers, second.layers) == ([1, 1], [2]), (first.layers, second.layers)


if __name__ == "__main__":
    main()
