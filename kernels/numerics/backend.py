"""What a compute backend takes and gives: the one interface between the server and the experts' arithmetic."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from expertd._native import CudaExecutor

LayerAddresses: TypeAlias = tuple[int, int, int, int]
"""Where a device has a layer: up_gate, its scales, down, its scales."""
NOWHERE: LayerAddresses = (0, 0, 0, 0)


class UnsupportedShape(ValueError):
    """Weights or a batch that a backend cannot take; the message names the size and the bound."""


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Weights of E local experts of one layer, contiguous, each with one FP32 scale per 128x128 block.

    A value is `weight.float() * scale of its block`. I is the experts' intermediate size, H the hidden size. Loaded as
    float8_e4m3fn, or as bfloat16 with scales of 1; a device may keep them in another type.
    """

    up_gate: Tensor
    """[E, 2I, H]; rows 0..I-1 are up_proj, rows I..2I-1 gate_proj."""
    up_gate_scales: Tensor
    """[E, 2I/128, H/128] float32."""
    down: Tensor
    """[E, H, I] of the same type."""
    down_scales: Tensor
    """[E, H/128, I/128] float32."""
    swiglu_limit: float | None = field(default=None, kw_only=True)
    """The bound on what goes into SwiGLU (`expertd.kernels.numerics.swiglu`), the same for all layers of a model."""

    @property
    def num_experts(self) -> int:
        return self.down.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.down.dtype

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the order of the fields."""
        return (self.up_gate, self.up_gate_scales, self.down, self.down_scales)

    @property
    def expert_bytes(self) -> int:
        """Of each expert; known of none, too."""
        return sum(math.prod(tensor.shape[1:]) * tensor.element_size() for tensor in self.tensors)

    @property
    def addresses(self) -> LayerAddresses:
        tensors = self.tensors
        return (tensors[0].data_ptr(), tensors[1].data_ptr(), tensors[2].data_ptr(), tensors[3].data_ptr())


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """T tokens with the local experts that each was routed to."""

    hidden: Tensor
    """[T, H] float8_e4m3fn with `scales`, or bfloat16 without; contiguous."""
    scales: Tensor | None
    """[T, H/128] float32: a value of `hidden` is `hidden.float() * scale of its 1x128 block`."""
    expert_ids: Tensor
    """[T, k] int32: local expert index 0..E-1, or -1 for none. An expert occurs at most once in a row."""
    weights: Tensor
    """[T, k] float32: routing weight of each (token, expert) pair; ignored where the id is -1."""
    reply: Tensor | None = None
    """[T, H] of the reply's dtype: where the sums are to be written; None for memory of the backend's own."""

    @property
    def num_tokens(self) -> int:
        return self.hidden.shape[0]

    @property
    def num_bytes(self) -> int:
        tensors = (self.hidden, self.scales, self.expert_ids, self.weights)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


@dataclass(frozen=True, slots=True)
class Partials:
    """Weighted sums over the local experts of each token, and what was computed for them."""

    sums: Tensor
    """[T, H] float32 or bfloat16: sum over the row's local experts of weight * expert(hidden)."""
    pairs: Tensor
    """[E] int32: (token, expert) pairs computed for each local expert."""


class DeviceSeconds(NamedTuple):
    """What one batch took on the device, stage by stage."""

    copy_in: float
    compute: float
    copy_out: float


@dataclass(frozen=True, slots=True)
class Computed:
    """One device batch in host memory."""

    sums: tuple[Tensor, ...]
    """[T, H] for each of the batch's requests, in their order."""
    pairs: Tensor
    """[E] int32: (token, expert) pairs computed for each local expert, over all requests."""
    seconds: DeviceSeconds


class Underway(Protocol):
    """A batch that the device was told to compute."""

    def result(self) -> Computed:
        """Wait for the end of the batch. Called once, by any thread; raises what the device met."""


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes of a GPU's memory."""

    size: int
    free: int
    allocated: int
    """Held by tensors of this process."""
    reserved: int
    """Held by this process for tensors, those that exist included."""


def spliced(base: Sequence[Tensor], kept: Mapping[int, int], added: Sequence[Tensor], room: int) -> list[Tensor]:
    """Each tensor [experts, ...] of another layer, with `room` for experts: at each position of `kept` the one that
    `base` has there, at all others those of `added`, in their order, and zeros behind them."""
    count = len(kept) + len(added[0])
    places = [position for position in range(count) if position not in kept]
    tensors = []
    for old, new in zip(base, added, strict=True):
        out = torch.empty(room, *old.shape[1:], dtype=old.dtype, device=old.device)
        for position, source in kept.items():
            out[position].copy_(old[source])
        for position, expert in zip(places, new, strict=True):
            out[position].copy_(expert)
        out[count:].view(torch.uint8).zero_()
        tensors.append(out)
    return tensors


FEW_TOKENS = 8


class Backend(Protocol):
    """Computes the expert FFNs of the layers that were loaded into it. Called by one thread only.

    The host tensors handed to `submit` must stay unchanged until the batch's `result` has returned.
    """

    @property
    def name(self) -> str:
        """The value of `--backend` that chooses this backend."""

    @property
    def device(self) -> str:
        """The hardware that computes, for people to read."""

    @property
    def depth(self) -> int:
        """Batches that may be under way at once, so that the copies of one overlap the computation of another."""

    def load_layer(self, layer: int, weights: LayerWeights) -> None:
        """Take a layer's weights from host memory, to be known as `layer`. Raises `UnsupportedShape`."""

    def splice_layer(self, layer: int, base: int | None, kept: Mapping[int, int], added: LayerWeights) -> None:
        """Make another layer: at each position of `kept` the expert that layer `base`, which stays, has there; at all
        others those of `added`, in their order. Without `base` there is none of `kept`. Called by any thread, beside
        everything else. Raises `UnsupportedShape`."""

    def drop_layer(self, layer: int) -> None:
        """Forget a layer's weights, which no batch uses any more; do nothing when there are none."""

    def warm_up(self) -> None:
        """Do after the last `load_layer` what would make the first batches slow, such as compiling."""

    def prepare_adding(self, devices: int) -> None:
        """After `warm_up`: this is one of several devices, which may add up on themselves what each has of a batch."""

    def submit(self, layer: int, requests: Sequence[TokenBatch], reply_dtype: torch.dtype) -> Underway:
        """Start computing several requests, of one dtype and one top_k, as one batch."""

    def compute_beside(self, layer: int, request: TokenBatch) -> Tensor:
        """[T, H] FP32 of a few tokens, T at most `FEW_TOKENS`, beside what an engine has the device compute."""

    def native_executor(self) -> CudaExecutor | None:
        """What an engine takes after `warm_up`, to compute in the place of `submit`; None: only `submit` does."""

    def layer_addresses(self, layer: int) -> LayerAddresses:
        """Where the device has a layer, for the engine's requests; `NOWHERE` without it or a `native_executor`."""

    def synchronize(self) -> None:
        """Wait until the device has done everything that it was asked for; raises what it met. Called by any thread."""

    def memory(self) -> DeviceMemory | None:
        """The memory of the device; None for a CPU, whose memory the operating system accounts for."""

    def count_usable(self) -> int | None:
        """Bytes of it that new tensors can have. Looks through all that there are: not for every few seconds."""
