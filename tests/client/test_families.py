"""Families beside those of the plug-in's own tests: layers on two servers against transformers' own blocks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from expertd.client.base.gate import load_gates
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.kernels.model.families import FAMILIES
from expertd.kernels.numerics.routing import route, router_logits, weigh
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.proto.base.errors import InvalidBatch
from tests.support.families import SERVED, load_blocks, pack, publish, routed, write_family
from tests.support.serving import running_server


@pytest.mark.parametrize("model_type", SERVED)
async def test_layers_route_and_compute_as_transformers_does(model_type: str, tmp_path: Path) -> None:
    folders = write_family(tmp_path, model_type)
    local = load_blocks(folders.floats)
    with Checkpoint(folders.quantized) as checkpoint:
        family, moe_layers = checkpoint.config.family, checkpoint.config.moe_layers
        # Qwen3-VL's alone are written fused: two weights with their scales for all experts.
        experts = 4 if family.transposed else 16 * 6
        assert len(checkpoint.moe_tensors) == len(moe_layers) * (experts + 1 + family.has_correction_bias)
    await compare(folders.quantized, local, model_type)


@pytest.mark.parametrize("model_type", [name for name in SERVED if FAMILIES[name].fused])
async def test_tensors_of_all_experts_compute_as_transformers_does(model_type: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path, model_type).plain
    local = load_blocks(folder)
    publish(folder, model_type)
    with Checkpoint(folder) as checkpoint:
        assert len(checkpoint.moe_tensors) == len(checkpoint.config.moe_layers) * 3
    await compare(folder, local, model_type, weights="bf16")


@pytest.mark.parametrize("model_type", [name for name in SERVED if FAMILIES[name].packed])
async def test_experts_in_mxfp4_compute_as_transformers_does(model_type: str, tmp_path: Path) -> None:
    folders = write_family(tmp_path, model_type)
    pack(folders, model_type)
    await compare(folders.quantized, load_blocks(folders.floats), model_type)


async def compare(folder: Path, local: dict[int, Any], model_type: str, **options: Any) -> None:  # noqa: ANN401
    """Layers of a checkpoint on two servers with blocks of transformers, by layer."""
    with Checkpoint(folder) as checkpoint:
        gates = load_gates(checkpoint, checkpoint.config.moe_layers)
    config = CoordinatorConfig(gates=gates, hidden_dtype=torch.bfloat16, reply_dtype=torch.float32)
    hidden = torch.randn(200, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    tokens = torch.randint(0, 1024, (200,), generator=torch.Generator().manual_seed(3))
    async with (
        running_server(folder, range(8), **options) as low,
        running_server(folder, range(8, 16), **options) as high,
        Coordinator([str(low.address), str(high.address)], config) as moe,
    ):
        assert moe.model.model_type == model_type
        assert moe.layers == tuple(local)
        for layer, gate in gates.items():
            with torch.inference_mode():
                expected, ids, weights = routed(local[layer], hidden.float(), tokens)
            logits, given = router_logits(hidden, gate.weight), {}
            if gate.table is None:
                chosen, shares = route(logits, gate.correction_bias, moe.model)
            else:
                chosen = gate.table[tokens]
                shares = weigh(logits, chosen, moe.model)
                given = {"topk_ids": chosen, "topk_weights": shares}
                with pytest.raises(InvalidBatch, match=f"layer {layer} chooses experts by token id, .* give topk_ids"):
                    await moe(layer, hidden)
            order = chosen.argsort(dim=1)
            assert torch.equal(chosen.gather(1, order).long(), ids)
            torch.testing.assert_close(shares.gather(1, order), weights, rtol=1e-5, atol=1e-7)
            # The output is BF16.
            assert relative_error(await moe(layer, hidden, **given), expected) < 3e-3
