"""The routed experts of one layer as transformers computes them, in FP32, from the same checkpoint."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expertd.client.integrations.huggingface_blocks import has_shared, run_shared
from expertd.kernels.model.config import InvalidConfig
from expertd.kernels.model.families import Family
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import read_matrix

THEIRS = {"kimi_k2": "deepseek_v3"}
"""`model_type` -> transformers' for the same class."""


@dataclass(frozen=True, slots=True, eq=False)
class TransformersOracle:
    """transformers' block of a family with the weights of one layer, dequantised."""

    module: Any

    @torch.inference_mode()
    def route(self, hidden: Tensor) -> Tensor:
        """Expert ids [T, k] int64, ascending in each row, of hidden states [T, H]."""
        _, _, ids = self.module.gate(hidden.float())
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
        _, weights, ids = self.module.gate(hidden.float())
        output: Tensor = self.module.experts(received.float(), ids, weights)
        return output

    @torch.inference_mode()
    def shared(self, hidden: Tensor) -> Tensor:
        """The shared experts' part [T, H] float32, which no server computes; zeros where there are none."""
        values = hidden.float()
        return run_shared(self.module, values) if has_shared(self.module) else torch.zeros_like(values)


def load_oracle(checkpoint: Checkpoint, layer: int) -> TransformersOracle:
    """Build the oracle of `layer`, in 4 bytes of memory a parameter.

    Raises `CheckpointError`, or `InvalidConfig` for a family whose tensors have other names than the block's.
    """
    family = checkpoint.config.family
    if not _names_are_the_blocks(family):
        raise InvalidConfig(
            f"model_type {checkpoint.config.model_type!r} cannot be compared with {family.source}, which names tensors"
            " otherwise; serve the model and use 'expertd verify'"
        )
    module = _empty_block(checkpoint)
    state = {name: weight for name, weight in module.state_dict().items() if not name.startswith("experts.")}
    for name, weight in state.items():
        state[name] = _read(checkpoint, f"{family.prefix}layers.{layer}.{family.module}.{name}", weight.shape)
    module.load_state_dict(state | _read_experts(checkpoint, layer), assign=True)
    return TransformersOracle(module.eval())


def _names_are_the_blocks(family: Family) -> bool:
    usual = Family(source="", published="")
    own = (family.module, family.gate, family.bias or usual.bias, family.projections, family.prefix, family.fused)
    return own == (usual.module, usual.gate, usual.bias, usual.projections, usual.prefix, usual.fused)


def _empty_block(checkpoint: Checkpoint) -> Any:  # noqa: ANN401
    """The block that the family names, without weights."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = checkpoint.config.model_type
    kind: Any = CONFIG_MAPPING[THEIRS.get(model_type, model_type)]
    config = kind(**json.loads((checkpoint.folder / "config.json").read_text()))
    config._experts_implementation = "eager"
    modeling = importlib.import_module(kind.__module__.replace(".configuration_", ".modeling_"))
    with torch.device("meta"):
        return getattr(modeling, checkpoint.config.family.source)(config)


def _read(checkpoint: Checkpoint, name: str, shape: torch.Size) -> Tensor:
    if len(shape) == 2:
        return read_matrix(checkpoint, name, *shape)
    return checkpoint.read(name, tuple(shape), torch.bfloat16, torch.float32).float()


def _read_experts(checkpoint: Checkpoint, layer: int) -> dict[str, Tensor]:
    model = checkpoint.config
    hidden, inner, count = model.hidden_size, model.moe_intermediate_size, model.n_routed_experts
    gate_up, down = torch.empty(count, 2 * inner, hidden), torch.empty(count, hidden, inner)
    for expert in range(count):
        gate, up, back = (model.family.expert_weight(layer, expert, f"{one}_proj") for one in ("gate", "up", "down"))
        gate_up[expert, :inner] = read_matrix(checkpoint, gate, inner, hidden)
        gate_up[expert, inner:] = read_matrix(checkpoint, up, inner, hidden)
        down[expert] = read_matrix(checkpoint, back, hidden, inner)
    return {"experts.gate_up_proj": gate_up, "experts.down_proj": down}
