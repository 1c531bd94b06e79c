"""Reading a stored matrix, checked, into the tensors that a server computes with."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from expertd.kernels.numerics.mxfp4 import convert_into, decode
from expertd.kernels.numerics.quantize import dequantize_weights, quantize_weights
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError, StoredTensor
from expertd.kernels.weights.sources import Source

NO_NUMBER = 0xFF
"""The exponent that means none."""
Target = tuple[Tensor, Tensor]
"""A projection's weight [N, K] float8_e4m3fn or bfloat16, and its scales [N/128, K/128] float32."""
OnInexact = Callable[[int], None]
"""Hears of how many weights in MXFP4 are not what was stored, where there are any."""


def read_source(
    checkpoint: Checkpoint, source: Source, targets: Sequence[Target], on_inexact: OnInexact = lambda _: None
) -> tuple[Tensor, ...]:
    """Read a matrix into the target of each of its projections. Returns what `source.tensors` hold.

    Raises `CheckpointError` for what is truncated, not finite, badly scaled or nothing but zeros.
    """
    content = _content(source, targets[0][0])
    checkpoint.read_into(source.weight, content)
    matrices = zip(source.split(content), targets, strict=True)
    if source.scales is None:
        for matrix, target in matrices:
            _serve_plain(source.weight, matrix, target)
        return (content,)
    stored = checkpoint.load(source.scales)
    for (matrix, (weight, scales)), blocks in zip(matrices, source.split(stored), strict=True):
        if source.packed:
            _convert(source, matrix, blocks, (weight, scales), on_inexact)
            continue
        _check_codes(source.weight, matrix)
        _copy(matrix, weight)
        scales.copy_(blocks)
        _check_scales(source.scales, scales)
    return content, stored


def read_values(checkpoint: Checkpoint, source: Source) -> dict[str, Tensor]:
    """The stored values of each projection, [N, K] float32. Checks nothing; raises `CheckpointError`."""
    stored = checkpoint.load(source.weight)
    if source.scales is None:
        values = stored.float()
    elif source.packed:
        values = decode(stored, checkpoint.load(source.scales))
    else:
        values = dequantize_weights(stored.float(), checkpoint.load(source.scales).float())
    return dict(zip(source.projections, source.split(values), strict=True))


def _content(source: Source, weight: Tensor) -> Tensor:
    """Where to read to: right into `weight`, where that is served byte for byte as it is stored."""
    stored = source.stored
    if source.as_served and weight.dtype == stored:
        return weight
    return torch.empty(source.weight.shape, dtype=stored, device="cpu")


def _serve_plain(stored: StoredTensor, matrix: Tensor, target: Target) -> None:
    """BF16 as it is, or rounded to FP8 blocks."""
    if not matrix.isfinite().all():
        raise CheckpointError(f"{stored.file}: tensor {stored.name}: expected finite values, found NaN or Inf")
    if not matrix.any():
        raise _no_weights(stored)
    weight, scales = target
    if weight.dtype == matrix.dtype:
        _copy(matrix, weight)
        return
    rounded, blocks = quantize_weights(matrix)
    weight.copy_(rounded)
    scales.copy_(blocks)


def _convert(source: Source, packed: Tensor, exponents: Tensor, target: Target, on_inexact: OnInexact) -> None:
    """MXFP4 to FP8 blocks."""
    assert source.scales is not None
    codes = exponents.view(torch.uint8)
    if codes.max() == NO_NUMBER:
        raise _bad_scales(source.scales, math.nan)
    inexact, any_weights = convert_into(packed, exponents, *target)
    if not any_weights:
        raise _no_weights(source.weight)
    if inexact:
        on_inexact(inexact)


def _copy(matrix: Tensor, weight: Tensor) -> None:
    if matrix.data_ptr() != weight.data_ptr():
        weight.copy_(matrix)


def _check_codes(stored: StoredTensor, matrix: Tensor) -> None:
    # The two NaN codes of E4M3, 0x7F and 0xFF, are the largest bytes as signed and as unsigned numbers.
    codes = matrix.view(torch.uint8).numpy()
    largest = codes.view("int8").max()
    if codes.max() == 0xFF or largest == 0x7F:
        raise CheckpointError(f"{stored.file}: tensor {stored.name}: expected finite values, found NaN")
    # Only what holds no positive number is looked at again.
    if largest <= 0 and not (codes & 0x7F).any():
        raise _no_weights(stored)


def _check_scales(stored: StoredTensor, scales: Tensor) -> None:
    good = scales.isfinite() & (scales >= 0)
    if not good.all():
        raise _bad_scales(stored, scales[~good][0].item())
    if not scales.any():
        raise _no_weights(stored)


def _bad_scales(stored: StoredTensor, found: float) -> CheckpointError:
    return CheckpointError(f"{stored.file}: tensor {stored.name}: expected finite scales >= 0, found {found}")


def _no_weights(stored: StoredTensor) -> CheckpointError:
    return CheckpointError(
        f"{stored.file}: tensor {stored.name}: expected weights, found nothing but zeros, with which the expert would"
        " add nothing to any token: is the download complete?"
    )
