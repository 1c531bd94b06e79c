"""Stream-ordered calls as an operator of torch's, which torch.compile takes as it is."""

from __future__ import annotations

import itertools
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Called(Protocol):
    """What enqueues calls: see `SyncCoordinator.on_stream`."""

    def __call__(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor: ...


_called: WeakValueDictionary[int, Called] = WeakValueDictionary()
_numbers = itertools.count(1)


def register(called: Called) -> int:
    """The number by which the operator knows `called`, as long as somebody else keeps it."""
    number = next(_numbers)
    _called[number] = called
    return number


@torch.library.custom_op("expertd::on_stream", mutates_args=())
def on_stream(number: int, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """Enqueue a call of what `register` gave this number: [..., H] like `hidden`."""
    called = _called.get(number)
    if called is None:
        raise RuntimeError("the coordinator was closed, or prepared anew: compile again after prepare_stream")
    return called(layer, hidden, topk_ids, topk_weights)


@on_stream.register_fake
def _(number: int, layer: int, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)
