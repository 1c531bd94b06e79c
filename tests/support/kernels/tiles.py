"""cuTile kernels of one row a block by NumPy: what their source says, without a GPU and its compiler."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, ModuleType, SimpleNamespace
from typing import Any

import cuda.tile as ct
import numpy as np
import numpy.typing as npt

from expertd.kernels.cutile.base.launch import Launch

Tile = npt.NDArray[Any]


class Array(np.ndarray[Any, Any]):
    """A tensor as kernels see it."""

    def slice(self, axis: int, start: int, stop: int) -> Array:
        return self[(*[slice(None)] * axis, slice(start, stop))].view(Array)


def run(launch: Launch) -> None:
    """Every block of a launch on tensors of the CPU, one after the other."""
    arguments = [value.numpy().view(Array) if hasattr(value, "numpy") else value for value in launch.args]
    for block in range(launch.grid[0]):
        with np.errstate(over="ignore", invalid="ignore"):
            _rebound(launch.kernel._pyfunc, _language(block))(*arguments)


def called(function: Callable[..., Any], *tiles: Tile) -> Tile:
    """What a function that kernels call makes of tiles."""
    result: Tile = _rebound(function, _language(0))(*tiles)
    return result


def _language(block: int) -> SimpleNamespace:
    """What kernels call of `cuda.tile`, in the block of this index."""
    return SimpleNamespace(
        PaddingMode=ct.PaddingMode,
        RoundingMode=ct.RoundingMode,
        float32=np.float32,
        int32=np.int32,
        abs=np.abs,
        exp=np.exp,
        maximum=lambda one, other, propagate_nan=False: np.maximum(one, other),
        minimum=lambda one, other, propagate_nan=False: np.minimum(one, other),
        sqrt=np.sqrt,
        truediv=lambda one, other, rounding_mode: one / other,
        where=_where,
        full=lambda shape, value, dtype: np.full(shape, value, dtype),
        zeros=lambda shape, dtype: np.zeros(shape, dtype),
        arange=lambda count, dtype: np.arange(count, dtype=dtype),
        max=lambda tile, axis=None, keepdims=False: np.max(tile, axis=axis, keepdims=keepdims),
        sum=lambda tile, axis=None, keepdims=False: np.sum(tile, axis=axis, keepdims=keepdims, dtype=tile.dtype),
        argmax=lambda tile, axis, keepdims: np.argmax(tile, axis=axis, keepdims=keepdims),
        bid=lambda axis: block,
        gather=_gather,
        load=_load,
        store=_store,
    )


def _rebound(function: Any, language: SimpleNamespace) -> FunctionType:  # noqa: ANN401
    """`function`, and all of this project that it calls, with `language` in the place of `cuda.tile`."""

    def own(value: object) -> object:
        if isinstance(value, ModuleType) and value is ct:
            return language
        if isinstance(value, FunctionType) and value.__module__.startswith("expertd.kernels.cutile."):
            return _rebound(value, language)
        return value

    around, code = function.__globals__, function.__code__
    return FunctionType(code, {name: own(around[name]) for name in code.co_names if name in around})


def _where(condition: Tile, yes: Any, no: Any) -> Tile:  # noqa: ANN401
    """Numbers have the other side's dtype, as in kernels."""
    dtype = next(one.dtype for one in (yes, no) if isinstance(one, np.ndarray | np.generic))
    return np.where(condition, np.asarray(yes, dtype), np.asarray(no, dtype))


def _gather(array: Tile, index: Any, mask: Tile) -> Tile:  # noqa: ANN401
    """Zeros where the mask is false."""
    parts = index if isinstance(index, tuple) else (index,)
    inside = tuple(np.where(mask, part, 0) for part in parts)
    return np.where(mask, array[inside], array.dtype.type(0))


def _load(array: Tile, index: tuple[int, ...], shape: tuple[int, ...], padding_mode: object = None) -> Tile:
    """Zeros beyond the array."""
    tile = np.zeros(shape, array.dtype)
    inside = array[_block(index, shape)]
    tile[tuple(map(slice, inside.shape))] = inside
    return tile


def _store(array: Tile, index: tuple[int, ...], tile: Tile) -> None:
    """What is beyond the array is left out."""
    room = array[_block(index, tile.shape)]
    room[...] = tile[tuple(map(slice, room.shape))]


def _block(index: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(at * size, (at + 1) * size) for at, size in zip(index, shape, strict=True))
