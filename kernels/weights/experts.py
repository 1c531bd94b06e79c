"""Loading experts from a checkpoint into host memory: a layer's as backends take them, or one's as plain numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd.kernels.model.config import BLOCK, MoeConfig
from expertd.kernels.numerics.backend import LayerWeights
from expertd.kernels.numerics.quantize import FP8, dequantize_weights, quantize_weights
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError, StoredTensor
from expertd.kernels.weights.digests import expert_digest, tensor_digest

READERS = 4
"""Threads that read and quantise at once; a read releases the interpreter lock."""
SCALES = "_scale_inv"
"""Behind the name of a weight in FP8."""
HASHERS = 8
"""Threads that hash what was read, so that readers need not wait; a core hashes about as fast as a disk reads."""

OnBytes = Callable[[int], None]
OnDigest = Callable[[int, int, bytes], None]
"""Hears of layer, expert and the `expert_digest` of what was loaded; raises where that must not be used."""


@dataclass(frozen=True, slots=True)
class ExpertMatrices:
    """One expert's weights as plain numbers, FP32."""

    up: Tensor
    """[I, H]."""
    gate: Tensor
    """[I, H]."""
    down: Tensor
    """[H, I]."""


def layer_bytes(checkpoint: Checkpoint, layer: int, experts: Sequence[int], dtype: torch.dtype = FP8) -> int:
    """Bytes that `load_layer` will read. Checks that every tensor is there, with the right shape and dtype."""
    return sum(stored.num_bytes for expert in experts for stored in expert_tensors(checkpoint, layer, expert, dtype))


def stored_dtypes(checkpoint: Checkpoint, experts: Mapping[int, Sequence[int]]) -> tuple[torch.dtype, ...]:
    """What the files hold the weights of these experts, by layer, as: float8_e4m3fn, bfloat16, or both.

    Raises `CheckpointError`.
    """
    every = (
        stored
        for layer, chosen in experts.items()
        for expert in chosen
        for stored in expert_tensors(checkpoint, layer, expert)
    )
    found = {stored.dtype for stored in every if not stored.name.endswith(SCALES)}
    return tuple(dtype for name, dtype in (("F8_E4M3", FP8), ("BF16", torch.bfloat16)) if name in found)


def expert_tensors(
    checkpoint: Checkpoint, layer: int, expert: int, dtype: torch.dtype = FP8
) -> tuple[StoredTensor, ...]:
    """An expert's tensors in the order of its digest, checked for shape and whether they can be served as `dtype`.

    Raises `CheckpointError`.
    """
    return tuple(
        stored
        for name, rows, columns in _projections(checkpoint.config)
        for stored in _find(
            checkpoint, checkpoint.config.family.expert_weight(layer, expert, name), rows, columns, dtype
        )
    )


def load_layer(
    checkpoint: Checkpoint,
    layer: int,
    experts: Sequence[int],
    on_bytes: OnBytes,
    on_digest: OnDigest | None = None,
    dtype: torch.dtype = FP8,
) -> LayerWeights:
    """Read the experts of one layer as `dtype`; for float8_e4m3fn BF16 weights are quantised. `on_bytes` hears of every
    tensor read, `on_digest` of every expert; without it nothing is hashed.

    Raises `CheckpointError` for tensors that are missing, truncated, of another shape or dtype, badly scaled or all
    zero, and what `on_digest` raises.
    """
    config = checkpoint.config
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    weights = LayerWeights(
        up_gate=torch.empty(len(experts), 2 * inner, hidden, dtype=dtype),
        up_gate_scales=torch.ones(len(experts), 2 * inner // BLOCK, hidden // BLOCK),
        down=torch.empty(len(experts), hidden, inner, dtype=dtype),
        down_scales=torch.ones(len(experts), hidden // BLOCK, inner // BLOCK),
    )

    def load_expert(local: int) -> list[Future[bytes]]:
        """The digests of the expert's tensors."""
        hashing = []
        up, gate = weights.up_gate[local].chunk(2)
        up_scales, gate_scales = weights.up_gate_scales[local].chunk(2)
        targets = {
            "up_proj": (up, up_scales),
            "gate_proj": (gate, gate_scales),
            "down_proj": (weights.down[local], weights.down_scales[local]),
        }
        for projection, rows, columns in _projections(config):
            name = config.family.expert_weight(layer, experts[local], projection)
            found = _find(checkpoint, name, rows, columns, dtype)
            contents = _load(checkpoint, found, *targets[projection])
            if on_digest is not None:
                hashing += [hashers.submit(tensor_digest, *read) for read in zip(found, contents, strict=True)]
            on_bytes(sum(stored.num_bytes for stored in found))
        return hashing

    with (
        ThreadPoolExecutor(HASHERS, thread_name_prefix="digests") as hashers,
        ThreadPoolExecutor(READERS, thread_name_prefix="weights") as readers,
    ):
        for expert, hashing in zip(experts, readers.map(load_expert, range(len(experts))), strict=True):
            if on_digest is not None:
                on_digest(layer, expert, expert_digest(digest.result() for digest in hashing))
    return weights


def read_expert(checkpoint: Checkpoint, layer: int, expert: int, dtype: torch.dtype = FP8) -> ExpertMatrices:
    """The values that a server of `dtype` holds for an expert: to FP8 blocks BF16 weights are rounded.

    Shares nothing with `load_layer` but the names, so that one may check the other. Raises `CheckpointError`.
    """

    def read(projection: str, rows: int, columns: int) -> Tensor:
        name = checkpoint.config.family.expert_weight(layer, expert, projection)
        matrix = read_matrix(checkpoint, name, rows, columns)
        if dtype != FP8 or checkpoint.find(name).dtype == "F8_E4M3":
            return matrix
        return dequantize_weights(*quantize_weights(matrix))

    up, gate, down = (read(*projection) for projection in _projections(checkpoint.config))
    return ExpertMatrices(up, gate, down)


def read_matrix(checkpoint: Checkpoint, name: str, rows: int, columns: int) -> Tensor:
    """A weight [rows, columns] as float32, dequantised when it is stored in FP8. Raises `CheckpointError`."""
    weight = checkpoint.read(name, (rows, columns), FP8, torch.bfloat16, torch.float32)
    if weight.dtype != FP8:
        return weight.float()
    blocks = (rows // BLOCK, columns // BLOCK)
    scales = checkpoint.read(name + SCALES, blocks, torch.float32, torch.bfloat16)
    return dequantize_weights(weight, scales.float())


def _projections(config: MoeConfig) -> tuple[tuple[str, int, int], ...]:
    """Name, rows and columns of each of an expert's matrices."""
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    return (("up_proj", inner, hidden), ("gate_proj", inner, hidden), ("down_proj", hidden, inner))


def _find(checkpoint: Checkpoint, name: str, rows: int, columns: int, dtype: torch.dtype) -> tuple[StoredTensor, ...]:
    """The stored weight, to be served as `dtype`, followed by its stored scales when it is FP8."""
    weight = checkpoint.check(name, (rows, columns), FP8, torch.bfloat16)
    if weight.dtype == "BF16":
        return (weight,)
    if dtype != FP8:
        raise CheckpointError(
            f"{weight.file}: tensor {name} is FP8 already; --weights bf16 is for checkpoints of BF16: leave it out"
        )
    blocks = (rows // BLOCK, columns // BLOCK)
    return (weight, checkpoint.check(name + SCALES, blocks, torch.float32, torch.bfloat16))


def _load(
    checkpoint: Checkpoint, found: tuple[StoredTensor, ...], weight: Tensor, scales: Tensor
) -> tuple[Tensor, ...]:
    """Read one matrix into `weight` and `scales`, views of the layer's tensors. Returns what `found` holds."""
    if len(found) == 1:
        kept = weight.dtype == torch.bfloat16
        plain = weight if kept else torch.empty(found[0].shape, dtype=torch.bfloat16)
        checkpoint.read_into(found[0], plain)
        if not plain.isfinite().all():
            raise CheckpointError(f"{found[0].file}: tensor {found[0].name}: expected finite values, found NaN or Inf")
        if not plain.any():
            raise _no_weights(found[0])
        if not kept:
            quantized, block_scales = quantize_weights(plain)
            weight.copy_(quantized)
            scales.copy_(block_scales)
        return (plain,)
    checkpoint.read_into(found[0], weight)
    # The two NaN codes of E4M3, 0x7F and 0xFF, are the largest bytes as signed and as unsigned numbers.
    codes = weight.view(torch.uint8).numpy()
    largest = codes.view("int8").max()
    if codes.max() == 0xFF or largest == 0x7F:
        raise CheckpointError(f"{found[0].file}: tensor {found[0].name}: expected finite values, found NaN")
    # Only what holds no positive number is looked at again.
    if largest <= 0 and not (codes & 0x7F).any():
        raise _no_weights(found[0])
    stored_scales = checkpoint.read(found[1].name, found[1].shape, torch.float32, torch.bfloat16)
    scales.copy_(stored_scales)
    if not (scales.isfinite().all() and (scales >= 0).all()):
        bad = scales[~(scales.isfinite() & (scales >= 0))][0].item()
        raise CheckpointError(f"{found[1].file}: tensor {found[1].name}: expected finite scales >= 0, found {bad}")
    if not scales.any():
        raise _no_weights(found[1])
    return weight, stored_scales


def _no_weights(stored: StoredTensor) -> CheckpointError:
    return CheckpointError(
        f"{stored.file}: tensor {stored.name}: expected weights, found nothing but zeros, with which the expert would"
        " add nothing to any token: is the download complete?"
    )
