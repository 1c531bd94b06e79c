"""The routed experts of one layer as transformers computes them, in FP32, from the same checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from expertd.client.base.gate import load_gates
from expertd.kernels.model.config import InvalidConfig
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import read_matrix

if TYPE_CHECKING:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE


@dataclass(frozen=True, slots=True, eq=False)
class TransformersOracle:
    """transformers' DeepseekV3MoE with the weights of one layer, dequantised."""

    module: DeepseekV3MoE

    @torch.inference_mode()
    def route(self, hidden: Tensor) -> Tensor:
        """Expert ids [T, k] int64, ascending in each row, of hidden states [T, H]."""
        _, _, ids = self.module.gate(hidden.float())
        ordered: Tensor = ids.sort(dim=-1).values
        return ordered

    @torch.inference_mode()
    def layer(self, hidden: Tensor) -> Tensor:
        """The module's whole output [T, H] float32: routed experts and shared experts."""
        output: Tensor = self.module(hidden.float().unsqueeze(0))
        return output.squeeze(0)

    @torch.inference_mode()
    def shared(self, hidden: Tensor) -> Tensor:
        """The shared experts' part [T, H] float32, which no server computes."""
        output: Tensor = self.module.shared_experts(hidden.float())
        return output


def load_oracle(checkpoint: Checkpoint, layer: int) -> TransformersOracle:
    """Build the oracle of `layer`, in 4 bytes of memory a parameter.

    Raises `CheckpointError`, or `InvalidConfig` for another family than DeepSeek-V3.
    """
    if checkpoint.config.model_type != "deepseek_v3":
        raise InvalidConfig(
            f"model_type {checkpoint.config.model_type!r} cannot be compared with DeepseekV3MoE;"
            " serve the model and use 'expertd verify'"
        )
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(**json.loads((checkpoint.folder / "config.json").read_text()))
    config._experts_implementation = "eager"
    with torch.device("meta"):
        module = DeepseekV3MoE(config)
    prefix, model = f"model.layers.{layer}.mlp", checkpoint.config
    hidden, inner, count = model.hidden_size, model.moe_intermediate_size, model.n_routed_experts
    gate_up = torch.empty(count, 2 * inner, hidden)
    down = torch.empty(count, hidden, inner)
    for expert in range(count):
        name = f"{prefix}.experts.{expert}"
        gate_up[expert, :inner] = read_matrix(checkpoint, f"{name}.gate_proj.weight", inner, hidden)
        gate_up[expert, inner:] = read_matrix(checkpoint, f"{name}.up_proj.weight", inner, hidden)
        down[expert] = read_matrix(checkpoint, f"{name}.down_proj.weight", hidden, inner)
    gate = load_gates(checkpoint, (layer,))[layer]
    shared, shared_inner = f"{prefix}.shared_experts", inner * config.n_shared_experts
    state = {
        "experts.gate_up_proj": gate_up,
        "experts.down_proj": down,
        "gate.weight": gate.weight.float(),
        "gate.e_score_correction_bias": gate.correction_bias,
        "shared_experts.gate_proj.weight": read_matrix(checkpoint, f"{shared}.gate_proj.weight", shared_inner, hidden),
        "shared_experts.up_proj.weight": read_matrix(checkpoint, f"{shared}.up_proj.weight", shared_inner, hidden),
        "shared_experts.down_proj.weight": read_matrix(checkpoint, f"{shared}.down_proj.weight", hidden, shared_inner),
    }
    module.load_state_dict(state, assign=True)
    return TransformersOracle(module.eval())
