"""The routed experts of one layer as transformers computes them, in FP32, from the same checkpoint."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertd.client.integrations.huggingface_blocks import has_shared, route, run_shared
from expertd.kernels.model.config import InvalidConfig
from expertd.kernels.model.families import Family
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import read_matrix
from expertd.kernels.weights.reading import read_values
from expertd.kernels.weights.sources import expert_sources

THEIRS = {"kimi_k2": "deepseek_v3"}
"""`model_type` -> transformers' for the same class."""
SHARED = {"HYV3MoE": "shared_mlp"}
"""Block -> what its checkpoints call shared experts, where they do so otherwise."""


@dataclass(frozen=True, slots=True, eq=False)
class TransformersOracle:
    """transformers' block of a family with the weights of one layer, dequantised."""

    module: Any

    @torch.inference_mode()
    def route(self, hidden: Tensor) -> Tensor:
        """Expert ids [T, k] int64, ascending in each row, of hidden states [T, H]."""
        ids, _ = route(self.module, hidden.float(), None)
        ordered: Tensor = ids.sort(dim=-1).values
        return ordered

    @torch.inference_mode()
    def layer(self, hidden: Tensor) -> Tensor:
        """The module's whole output [T, H] float32: routed experts and, if it has any, shared experts."""
        output: Tensor = self.module(hidden.float().unsqueeze(0))
        return output.squeeze(0)

    @torch.inference_mode()
    def routed(self, hidden: Tensor, received: Tensor) -> Tensor:
        """The routed experts' part [T, H] float32, where the router has `hidden` and the experts `received`, [T, H]."""
        ids, weights = route(self.module, hidden.float(), None)
        output: Tensor = self.module.experts(received.float(), ids, weights)
        return output

    @torch.inference_mode()
    def shared(self, hidden: Tensor) -> Tensor:
        """The shared experts' part [T, H] float32, which no server computes; zeros where there are none."""
        values = hidden.float()
        return run_shared(self.module, values) if has_shared(self.module) else torch.zeros_like(values)


def load_oracle(checkpoint: Checkpoint, layer: int) -> TransformersOracle:
    """Build the oracle of `layer`, in 4 bytes of memory a parameter.

    Raises `CheckpointError`, or `InvalidConfig` for a family with layers whose experts token ids choose.
    """
    family = checkpoint.config.family
    if family.table is not None:
        raise InvalidConfig(
            f"model_type {checkpoint.config.model_type!r} has layers that choose experts by token id, which are not"
            " compared; serve the model and use 'expertd verify'"
        )
    module = _empty_block(checkpoint)
    state = {name: weight for name, weight in module.state_dict().items() if not name.startswith("experts.")}
    for name, weight in state.items():
        state[name] = _read(checkpoint, _name_in_checkpoint(family, layer, name), weight.shape)
    module.load_state_dict(state | _read_experts(checkpoint, layer), assign=True)
    return TransformersOracle(module.eval())


def _name_in_checkpoint(family: Family, layer: int, name: str) -> str:
    """Of what the block calls `name`."""
    if name.endswith("e_score_correction_bias"):
        return family.correction_bias(layer)
    if name == "gate.weight":
        return family.gate_weight(layer)
    name = name.replace("shared_experts", SHARED.get(family.source, "shared_experts"))
    return f"{family.prefix}layers.{layer}.{family.module}.{name}"


def _empty_block(checkpoint: Checkpoint) -> Any:  # noqa: ANN401
    """The block that the family names, without weights."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = checkpoint.config.model_type
    kind: Any = CONFIG_MAPPING[THEIRS.get(model_type, model_type)]
    config = kind(**json.loads((checkpoint.folder / "config.json").read_text())).get_text_config()
    config._experts_implementation = "eager"
    modeling = importlib.import_module(kind.__module__.replace(".configuration_", ".modeling_"))
    with torch.device("meta"):
        return getattr(modeling, checkpoint.config.family.source)(config)


def _read(checkpoint: Checkpoint, name: str, shape: torch.Size) -> Tensor:
    if len(shape) == 2:
        return read_matrix(checkpoint, name, *shape)
    # Some store a row of a vector.
    stored = checkpoint.find(name)
    return checkpoint.read(name, stored.shape, torch.bfloat16, torch.float32).float().reshape(shape)


def _read_experts(checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
    model = checkpoint.config
    hidden, inner, count = model.hidden_size, model.moe_intermediate_size, model.n_routed_experts
    gate_up, down = torch.empty(count, 2 * inner, hidden), torch.empty(count, hidden, inner)
    for expert in range(count):
        values: dict[str, Tensor] = {}
        for source in expert_sources(checkpoint, layer, expert):
            values |= read_values(checkpoint, source)
        gate_up[expert, :inner], gate_up[expert, inner:] = values["gate_proj"], values["up_proj"]
        down[expert] = values["down_proj"]
    return {"experts.gate_up_proj": gate_up, "experts.down_proj": down}
