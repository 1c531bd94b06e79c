"""The bound on what goes into SwiGLU, as kernels know it: a constant, so that without one nothing is computed."""

from __future__ import annotations

import math

import cuda.tile as ct


def limit_constant(limit: float | None) -> float:
    """What kernels are compiled for: infinity where there is no bound."""
    return math.inf if limit is None else limit


def bounded(up: ct.Tile, gate: ct.Tile, limit: float) -> tuple[ct.Tile, ct.Tile]:
    """FP32 tiles of up within [-limit, limit] and of gate up to `limit`, a constant; NaN stays NaN."""
    if limit < math.inf:
        up = ct.maximum(ct.minimum(up, limit, propagate_nan=True), -limit, propagate_nan=True)
        gate = ct.minimum(gate, limit, propagate_nan=True)
    return up, gate
