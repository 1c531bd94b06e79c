"""Golden batches: seeded tokens for one expert or for all of a layer, and how far a result is from the reference.

A fault in one 128x128 block hardly moves the error of a whole output: it drowns in the rounding to FP8. So most tokens
of an expert's batch have a single block of hidden states that is not zero. Their outputs are sums of parts, one for
each block of the intermediate values, and the difference from the reference is projected on each part: what is left,
as a share of the part, is by how much it was scaled, and rounding averages out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from expertd.kernels.model.config import BLOCK, MoeConfig
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.numerics.quantize import dequantize_activations, quantize_activations
from expertd.kernels.numerics.swiglu import swiglu
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.weights.experts import ExpertMatrices

TOKENS_PER_BLOCK = 4
DENSE_TOKENS = 16
LAYER_TOKENS = 64
WEAK = 1e-2
"""Blocks whose part has less than this share of the mean part's energy are judged ever more mildly: noise of the others
would decide about them."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far a correct server may be from the reference."""

    relative_error: float
    gain: float
    """Of an expert's whole output, from 1."""
    block_gain: float
    """Of one block, from 1."""

    def rounded(self) -> Bounds:
        """Those of what is rounded to FP8 once more: such errors have nothing to do with each other."""
        return Bounds(*map(math.hypot, astuple(self), astuple(ROUNDED)))


ROUNDED = Bounds(relative_error=3e-2, gain=1e-2, block_gain=4e-2)
"""Of values that are rounded to FP8, an error of 2.6e-2."""
BOUNDS: Mapping[str, Bounds] = {"torch": Bounds(relative_error=1e-5, gain=1e-5, block_gain=1e-4), "cutile": ROUNDED}
"""By backend, for replies in FP32. cutile rounds the intermediate values to FP8; see docs/numerics.md."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How a server's result compares with the reference."""

    layer: int
    expert: int | None
    """Global id; None for the batch in which every token has several experts."""
    tokens: int
    relative_error: float
    """||out - reference|| / ||reference||."""
    cosine: float
    gain: float
    """<out, reference> / <reference, reference>: 1 when right."""
    block_gain: float
    """The gain of the block that is furthest from 1."""
    block: str
    """Which block that is."""

    def faults(self, bounds: Bounds) -> tuple[str, ...]:
        """What is past its bound, for people to read; empty when all is well. NaN is past every bound."""
        checks = {
            "relative error": (self.relative_error, 0.0, bounds.relative_error),
            "gain": (self.gain, 1.0, bounds.gain),
            f"gain of {self.block}": (self.block_gain, 1.0, bounds.block_gain),
        }
        return tuple(
            f"{name} {value:.4g}, must be within {bound:g} of {right:g}"
            for name, (value, right, bound) in checks.items()
            if not abs(value - right) <= bound
        )


def expert_batch(config: MoeConfig, layer: int, expert: int, seed: int) -> TokenBatch:
    """Tokens for one expert (its global id): `TOKENS_PER_BLOCK` for each block of hidden states, then dense ones."""
    generator = _generator(seed, layer, expert)
    blocks = config.hidden_size // BLOCK
    hidden = torch.zeros(blocks, TOKENS_PER_BLOCK, blocks, BLOCK, dtype=torch.float32)
    each = torch.arange(blocks)
    # Of the same length as dense tokens.
    hidden[each, :, each] = torch.randn(
        blocks, TOKENS_PER_BLOCK, BLOCK, generator=generator, dtype=torch.float32
    ) * math.sqrt(blocks)
    dense = torch.randn(DENSE_TOKENS, config.hidden_size, generator=generator, dtype=torch.float32)
    stored, scales = quantize_activations(torch.cat([hidden.view(-1, config.hidden_size), dense]))
    ids = torch.full((len(stored), 1), expert, dtype=torch.int32)
    return TokenBatch(stored, scales, ids, torch.rand(len(stored), 1, generator=generator, dtype=torch.float32) + 0.5)


def layer_batch(config: MoeConfig, layer: int, experts: Sequence[int], seed: int) -> TokenBatch:
    """Tokens that each go to several of `experts` (global ids), up to the model's top-k."""
    generator = _generator(seed, layer, config.n_routed_experts)
    stored, scales = quantize_activations(
        torch.randn(LAYER_TOKENS, config.hidden_size, generator=generator, dtype=torch.float32)
    )
    top_k = min(config.num_experts_per_tok, len(experts))
    chosen = torch.rand(LAYER_TOKENS, len(experts), generator=generator, dtype=torch.float32).argsort(dim=1)[:, :top_k]
    ids = torch.tensor(experts, dtype=torch.int32)[chosen]
    return TokenBatch(
        stored, scales, ids, torch.rand(LAYER_TOKENS, top_k, generator=generator, dtype=torch.float32) + 0.5
    )


def expert_reference(batch: TokenBatch, expert: int, matrices: ExpertMatrices) -> Tensor:
    """What `expert` (its id in `batch`) adds to the sums [T, H], in FP32."""
    return _intermediate(batch, expert, matrices) @ matrices.down.T


def compare_layer(layer: int, out: Tensor, reference: Tensor) -> Agreement:
    """Agreement of the sums [T, H] of a `layer_batch`."""
    return _agreement(layer, None, out, reference, 1.0, "")


def compare_expert(layer: int, expert: int, out: Tensor, batch: TokenBatch, matrices: ExpertMatrices) -> Agreement:
    """Agreement of the sums [T, H] of an `expert_batch`, as a whole and block by block."""
    intermediate = _intermediate(batch, expert, matrices)
    reference = intermediate @ matrices.down.T
    gains = _block_gains(out - reference, intermediate, matrices.down)
    name, worst = max(gains.items(), key=lambda item: _furthest(item[1])[0])
    _, row, column = _furthest(worst)
    place = f"{name} block [{row}, {column}]"
    return _agreement(layer, expert, out, reference, 1 + float(worst[row, column]), place)


def _block_gains(difference: Tensor, intermediate: Tensor, down: Tensor) -> dict[str, Tensor]:
    """By how much each block's part of the output is too large, as a share of itself, from the block-sparse tokens.

    `difference` [T, H], `intermediate` [T, I], `down` [H, I]. Returns "up/gate" [I/128, H/128] and "down"
    [H/128, I/128].
    """
    hidden_blocks, inner_blocks = down.shape[0] // BLOCK, down.shape[1] // BLOCK
    sparse = hidden_blocks * TOKENS_PER_BLOCK
    parts = intermediate[:sparse].unflatten(1, (inner_blocks, BLOCK)).transpose(0, 1).contiguous()
    rows = difference[:sparse].unflatten(1, (hidden_blocks, BLOCK)).unbind(1)
    along = torch.empty(hidden_blocks, inner_blocks, hidden_blocks, dtype=torch.float64)
    energy = torch.empty_like(along)
    for row, weights in enumerate(down.unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))):
        # [inner block, token, 128]: what each inner block adds to these 128 outputs.
        added = parts @ weights.permute(1, 2, 0)
        for target, other in ((along, rows[row]), (energy, added)):
            by_token = (added * other).sum(dim=2, dtype=torch.float64)
            target[row] = by_token.unflatten(1, (hidden_blocks, TOKENS_PER_BLOCK)).sum(dim=2)
    return {"up/gate": _shares(along.sum(dim=0), energy.sum(dim=0)), "down": _shares(along.sum(2).T, energy.sum(2).T).T}


def _shares(along: Tensor, energy: Tensor) -> Tensor:
    """Differences along parts, [parts, groups], as shares of the parts; 0 where nothing contributes."""
    least = torch.finfo(torch.float64).tiny
    return along / (energy + WEAK * energy.mean(dim=0, keepdim=True)).clamp(min=least)


def _furthest(gains: Tensor) -> tuple[float, int, int]:
    """Distance and place of the element of a matrix that is furthest from zero; NaN is furthest."""
    distance = gains.abs().nan_to_num(nan=torch.inf)
    row, column = divmod(int(distance.argmax()), gains.shape[1])
    return float(distance[row, column]), row, column


def _intermediate(batch: TokenBatch, expert: int, matrices: ExpertMatrices) -> Tensor:
    """swiglu(x up^T, x gate^T) [T, I], times each token's routing weight for `expert`, in FP32."""
    hidden = batch.hidden.float() if batch.scales is None else dequantize_activations(batch.hidden, batch.scales)
    weights = batch.weights.where(batch.expert_ids == expert, 0.0).sum(dim=1, keepdim=True)
    return swiglu(hidden @ matrices.up.T, hidden @ matrices.gate.T, matrices.swiglu_limit) * weights


def _agreement(
    layer: int, expert: int | None, out: Tensor, reference: Tensor, block_gain: float, block: str
) -> Agreement:
    ours, right = out.double().flatten(), reference.double().flatten()
    along, energy = float(ours @ right), float(right @ right)
    both_zero = energy == 0 and not ours.any()
    return Agreement(
        layer=layer,
        expert=expert,
        tokens=len(out),
        relative_error=relative_error(out, reference),
        cosine=1.0 if both_zero else along / max(float(ours.norm() * right.norm()), 1e-300),
        gain=1.0 if both_zero else along / max(energy, 1e-300),
        block_gain=block_gain,
        block=block,
    )


def _generator(seed: int, layer: int, expert: int) -> torch.Generator:
    return torch.Generator().manual_seed(((seed * 1_000_003 + layer) * 1_000_003 + expert) % (2**61 - 1))
