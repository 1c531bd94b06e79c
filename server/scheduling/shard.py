"""What this server owns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import torch

from expertd._native import OwnedLayer, Placement
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.model.ranges import format_ranges
from expertd.kernels.numerics.backend import NOWHERE, LayerAddresses
from expertd.kernels.numerics.quantize import FP8
from expertd.server.options.config import InvalidOption, ServerConfig, Weights

WEIGHT_DTYPES: dict[Weights, torch.dtype] = {"fp8": FP8, "bf16": torch.bfloat16}
"""By --weights."""
Parts: TypeAlias = Callable[[int], Sequence[tuple[tuple[int, ...], LayerAddresses]]]
"""By a layer's key, what each device has of it, global ids, and where."""


@dataclass(frozen=True)
class Shard:
    """Some experts of some layers of one model."""

    config: MoeConfig
    model_fingerprint: str
    placement_epoch: int
    experts: Mapping[int, tuple[int, ...]]
    """Global ids, ascending, of each layer, which ascend too; the position in a tuple is the local id."""
    weight_dtype: torch.dtype = FP8
    """What the experts' weights are served as: float8_e4m3fn or bfloat16."""
    keys: Mapping[int, int] = field(default_factory=dict)
    """What the backend knows layers' weights by; those that are not in it by their own numbers."""

    def key(self, layer: int) -> int:
        return self.keys.get(layer, layer)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.experts)

    @property
    def config_fields(self) -> dict[str, int | float | bool | str | tuple[int, ...]]:
        """The fields of the model's `MoeConfig` that callers need."""
        return {name: value for name, value in self.config.fields.items() if name != "swiglu_limit"}

    def only(self, computable: Callable[[int], set[int]]) -> Shard:
        """The same without experts that are not `computable`, those of a layer by its key."""
        left = {layer: computable(self.key(layer)) for layer in self.experts}
        kept = {layer: tuple(e for e in experts if e in left[layer]) for layer, experts in self.experts.items()}
        return replace(self, experts={layer: experts for layer, experts in kept.items() if experts})

    def placement(
        self,
        max_tokens: int,
        parts: Parts | None = None,
        beside: Placement | None = None,
    ) -> Placement:
        """What requests, of at most `max_tokens` tokens, are checked against, and which devices compute them, once that
        is known; `beside` is that of other weights."""
        return Placement(
            model_fingerprint=self.model_fingerprint,
            epoch=self.placement_epoch,
            layers=[
                _owned(layer, experts, self.key(layer), () if parts is None else parts(self.key(layer)))
                for layer, experts in self.experts.items()
            ],
            layers_text=format_ranges(self.layers),
            num_routed_experts=self.config.n_routed_experts,
            hidden_size=self.config.hidden_size,
            max_top_k=self.config.num_experts_per_tok,
            max_tokens=max_tokens,
            beside=beside,
        )


def _owned(
    layer: int, experts: tuple[int, ...], key: int, parts: Sequence[tuple[tuple[int, ...], LayerAddresses]]
) -> OwnedLayer:
    text = format_ranges(experts)
    if len(parts) < 2:
        return OwnedLayer(layer, experts, experts_text=text, key=key, weights=parts[0][1] if parts else NOWHERE)
    local = {expert: place for place, expert in enumerate(experts)}
    devices = [
        OwnedLayer(layer, [local[expert] for expert in its], experts_text="", key=key, weights=weights)
        for its, weights in parts
    ]
    return OwnedLayer(layer, experts, experts_text=text, key=key, devices=devices)


def owned_layers(model: MoeConfig, config: ServerConfig) -> dict[int, tuple[int, ...]]:
    """The experts of each layer that a server is to begin with.

    Raises `InvalidOption` for layers or experts outside the model.
    """
    for layer in config.layers or ():
        if layer not in model.moe_layers:
            raise InvalidOption(
                f"--layers names layer {layer}; the model's MoE layers are {format_ranges(model.moe_layers)}"
            )
    if config.experts[-1] >= model.n_routed_experts:
        raise InvalidOption(
            f"--experts names expert {config.experts[-1]}; the model's experts are 0-{model.n_routed_experts - 1}"
        )
    return dict.fromkeys(config.layers or model.moe_layers, config.experts)
