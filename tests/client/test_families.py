"""Families that the Hugging Face plug-in does not know: layers on two servers against transformers' own blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd.client.base.gate import load_gates
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.kernels.numerics.routing import route, router_logits
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.weights.checkpoint import Checkpoint
from tests.support.families import SERVED, write_family
from tests.support.generation import AutoModel
from tests.support.serving import running_server


def routed(block: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN401
    """What a block of transformers adds for its routed experts, with their ids and weights, sorted by id."""
    bias = getattr(block, "e_score_correction_bias", None)
    _, weights, ids = block.gate(hidden) if bias is None else block.gate(hidden, bias)
    order = ids.argsort(dim=1)
    return block.experts(hidden, ids, weights), ids.gather(1, order), weights.gather(1, order)


@pytest.mark.parametrize("model_type", SERVED)
async def test_layers_route_and_compute_as_transformers_does(model_type: str, tmp_path: Path) -> None:
    folders = write_family(tmp_path, model_type)
    local = AutoModel.from_pretrained(folders.floats, dtype=torch.float32, experts_implementation="eager").eval()
    with Checkpoint(folders.quantized) as checkpoint:
        gates = load_gates(checkpoint, checkpoint.config.moe_layers)
        assert len(checkpoint.moe_tensors) == len(gates) * (16 * 6 + 1 + checkpoint.config.family.has_correction_bias)
    config = CoordinatorConfig(gates=gates, hidden_dtype=torch.bfloat16, reply_dtype=torch.float32)
    hidden = torch.randn(200, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    async with (
        running_server(folders.quantized, range(8)) as low,
        running_server(folders.quantized, range(8, 16)) as high,
        Coordinator([str(low.address), str(high.address)], config) as moe,
    ):
        assert moe.model.model_type == model_type
        assert moe.layers == tuple(layer for layer, one in enumerate(local.model.layers) if hasattr(one.mlp, "experts"))
        for layer, gate in gates.items():
            with torch.inference_mode():
                expected, ids, weights = routed(local.model.layers[layer].mlp, hidden.float())
            chosen, shares = route(router_logits(hidden, gate.weight), gate.correction_bias, moe.model)
            order = chosen.argsort(dim=1)
            assert torch.equal(chosen.gather(1, order).long(), ids)
            torch.testing.assert_close(shares.gather(1, order), weights, rtol=1e-5, atol=1e-7)
            # The output is BF16.
            assert relative_error(await moe(layer, hidden), expected) < 3e-3
