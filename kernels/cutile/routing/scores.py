"""From router logits to scores, and from the scores of chosen experts to their weights, as kernels do both."""

from __future__ import annotations

import math
from collections.abc import Mapping

import cuda.tile as ct

SIGMOID = 0
SOFTMAX = 1
SQRT_SOFTPLUS = 2
SCORINGS: Mapping[str, int] = {"sigmoid": SIGMOID, "softmax": SOFTMAX, "sqrtsoftplus": SQRT_SOFTPLUS}
"""`Family.scoring_func` -> the constant that kernels are compiled for."""


def scores_of(logits: ct.Tile, exists: ct.Tile, SCORING: int) -> ct.Tile:
    """FP32 scores [..., ...] of the logits of one token; where `exists` is false they mean nothing."""
    if SCORING == SIGMOID:
        return 1.0 / (1.0 + ct.exp(-logits))
    if SCORING == SQRT_SOFTPLUS:
        return ct.sqrt(softplus(logits))
    largest = ct.max(ct.where(exists, logits, -math.inf))
    powers = ct.where(exists, ct.exp(logits - largest), 0.0)
    return powers / ct.sum(powers)


def softplus(x: ct.Tile) -> ct.Tile:
    """log(1 + exp(x)) with an FP32 number's relative precision, also where exp(x) is lost beside 1."""
    power = ct.exp(-ct.abs(x))
    # log(1 + p) = 2 artanh(p / (2 + p)), whose argument is at most 1/3: what is left out of the series is below 1e-9.
    s = power / (2.0 + power)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return ct.maximum(x, 0.0) + 2.0 * s * series


def weights_of(scores: ct.Tile, NORMALIZE: bool, SCALE: float) -> ct.Tile:
    """The weights [1, k] of experts with these FP32 scores, zeros beyond a token's."""
    if NORMALIZE:
        scores = scores / (ct.sum(scores, axis=1, keepdims=True) + 1e-20)
    return scores * SCALE


def power_of_2(count: int) -> int:
    """The least power of two that is not below `count`; sides of tiles are powers of two."""
    return 1 << (count - 1).bit_length()
