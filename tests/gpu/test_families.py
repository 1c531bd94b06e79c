"""Layers of every family on the cuTile backend: small ones against transformers' blocks, others by the oracle."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.pipeline.arithmetic import Pipeline
from expertd.kernels.cutile.run.backend import CutileBackend
from expertd.kernels.cutile.tools.inputs import random_batch, random_weights
from expertd.kernels.numerics.backend import LayerWeights, TokenBatch
from expertd.kernels.numerics.quantize import dequantize_activations, quantize_activations
from expertd.kernels.oracle.reference import reference_partials, relative_error
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import load_layer
from tests.support.families import CONFIGS, SERVED, load_blocks, pack, routed, write_family
from tests.support.fence.markers import gpu_only

pytestmark = gpu_only

TOKENS = 200
EXPERTS = 16
BOUNDS: dict[Pipeline, float] = {"fast": 3e-2, "dequant": 1e-3}
PUBLISHED = {
    # Local experts, H, I; experts a token; the bound of SwiGLU.
    "DeepSeek-V3, V3.2, Kimi-K2": (ExpertShape(8, 7168, 2048), 8, None),
    "DeepSeek-V4-Flash": (ExpertShape(8, 4096, 2048), 6, 10.0),
    "DeepSeek-V4-Pro": (ExpertShape(8, 7168, 3072), 6, 10.0),
    "GLM-5": (ExpertShape(8, 6144, 2048), 8, None),
    "MiniMax-M2.5": (ExpertShape(8, 3072, 1536), 8, None),
    "ERNIE-4.5-300B": (ExpertShape(8, 8192, 3584), 8, None),
    "Qwen3-235B, Qwen3-VL": (ExpertShape(8, 4096, 1536), 8, None),
    "Qwen3-Next": (ExpertShape(8, 2048, 512), 10, None),
    "Qwen3.5-397B": (ExpertShape(8, 4096, 1024), 10, None),
    "Mixtral-8x7B": (ExpertShape(8, 4096, 14336), 2, None),
}


def compute(weights: LayerWeights, batch: TokenBatch, pipeline: Pipeline, cache: Path) -> Tensor:
    """Sums [T, H] float32 of host tensors."""
    top_k = batch.expert_ids.shape[1]
    made = CutileBackend(pipeline, max_batch_tokens=TOKENS, max_tokens=TOKENS, max_top_k=top_k, cache=cache)
    made.load_layer(0, weights)
    (sums,) = made.submit(0, [batch], torch.float32).result().sums
    return sums


@pytest.mark.parametrize("model_type", [*CONFIGS, *SERVED])
def test_a_layer_computes_as_transformers_does(model_type: str, tmp_path: Path) -> None:
    folders = write_family(tmp_path, model_type)
    if model_type == "deepseek_v4":
        pack(folders, model_type)
    layer, block = load_blocks(folders.floats).popitem()
    with Checkpoint(folders.quantized) as checkpoint:
        weights = load_layer(checkpoint, layer, range(EXPERTS), lambda _: None)
    chance = torch.Generator().manual_seed(3)
    hidden, scales = quantize_activations(torch.randn(TOKENS, 256, generator=chance))
    token_ids = torch.randint(0, 1024, (TOKENS,), generator=chance)
    with torch.inference_mode():
        expected, ids, shares = routed(block, dequantize_activations(hidden, scales), token_ids)
    batch = TokenBatch(hidden, scales, ids.int(), shares)
    for pipeline, bound in BOUNDS.items():
        sums = compute(weights, batch, pipeline, tmp_path / "tune.json")
        assert relative_error(sums, expected) < bound, pipeline


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_layer_of_published_size_is_the_oracles(name: str, tmp_path: Path) -> None:
    shape, top_k, limit = PUBLISHED[name]
    cuda = torch.device("cuda")
    weights = random_weights(shape, cuda, swiglu_limit=limit)
    batch = random_batch(shape, TOKENS, cuda, model_experts=16, top_k=top_k)
    expected = reference_partials(batch, weights).cpu()
    assert batch.scales is not None
    on_host = TokenBatch(batch.hidden.cpu(), batch.scales.cpu(), batch.expert_ids.cpu(), batch.weights.cpu())
    sums = compute(weights, on_host, "fast", tmp_path / "tune.json")
    assert relative_error(sums, expected) < BOUNDS["fast"]
