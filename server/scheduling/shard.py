"""What this server owns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from expertd._native import OwnedLayer, Placement
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.model.ranges import format_ranges
from expertd.kernels.numerics.backend import LayerAddresses
from expertd.kernels.numerics.quantize import FP8
from expertd.server.options.config import InvalidOption, ServerConfig, Weights

WEIGHT_DTYPES: dict[Weights, torch.dtype] = {"fp8": FP8, "bf16": torch.bfloat16}
"""By --weights."""
NOWHERE: LayerAddresses = (0, 0, 0, 0)


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

    def placement(
        self,
        max_tokens: int,
        addresses: Mapping[int, LayerAddresses] | None = None,
        beside: Placement | None = None,
    ) -> Placement:
        """What requests, of at most `max_tokens` tokens, are checked against, and where the device has the layers;
        `beside` is that of other weights."""
        return Placement(
            model_fingerprint=self.model_fingerprint,
            epoch=self.placement_epoch,
            layers=[
                OwnedLayer(
                    layer,
                    experts,
                    experts_text=format_ranges(experts),
                    key=self.key(layer),
                    weights=addresses[self.key(layer)] if addresses else NOWHERE,
                )
                for layer, experts in self.experts.items()
            ],
            layers_text=format_ranges(self.layers),
            num_routed_experts=self.config.n_routed_experts,
            hidden_size=self.config.hidden_size,
            max_top_k=self.config.num_experts_per_tok,
            max_tokens=max_tokens,
            beside=beside,
        )


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
