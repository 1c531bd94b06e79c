"""SwiGLU, the activation of experts, with the bound that some models set on what goes into it."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import silu


def swiglu(up: Tensor, gate: Tensor, limit: float | None = None) -> Tensor:
    """silu(gate) * up of tensors of one shape and dtype; with a `limit` of min(gate, limit) and of up within
    [-limit, limit] (DeepSeek-V4's inference code, and transformers' DeepseekV4Experts)."""
    if limit is not None:
        up, gate = up.clamp(-limit, limit), gate.clamp(max=limit)
    return silu(gate).mul_(up)
