"""Every kernel as it is launched in a shipped configuration: what tests compile without a GPU, and benches time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from expertd.kernels.cutile.base.fp8 import has_fp8
from expertd.kernels.cutile.base.launch import Gpu, Launch
from expertd.kernels.cutile.base.shape import SHAPE_CLASSES, ExpertShape
from expertd.kernels.cutile.dequant.layer import DequantConfig, DequantPipeline, default_config
from expertd.kernels.cutile.dequant.token_sort import sort_rows
from expertd.kernels.cutile.fast.layer import Workspace, layer_steps
from expertd.kernels.cutile.fast.tiles import LayerConfig
from expertd.kernels.cutile.fast.tiles import default_config as default_layer_config
from expertd.kernels.cutile.pipeline.arithmetic import STEP_TOKENS, STEPS
from expertd.kernels.cutile.pipeline.table import Table
from expertd.kernels.cutile.routing.quantize import quantize_activations
from expertd.kernels.cutile.routing.top_k import route
from expertd.kernels.cutile.routing.weigh import weigh
from expertd.kernels.cutile.run.adding import add_parts
from expertd.kernels.cutile.tools.inputs import random_batch, random_weights
from expertd.kernels.model.config import BLOCK, MoeConfig
from expertd.kernels.numerics.quantize import FP8

META = torch.device("meta")
V3 = ExpertShape()


def shipped_launches(arch: str, table: Table, shape: ExpertShape = V3) -> Iterator[Launch]:
    """The launches of every shape class on `arch` ("sm_90", ...), each kernel and signature at least once."""
    gpu = Gpu(arch, processors=132)
    for tokens in SHAPE_CLASSES:
        config = table.get("dequant", shape.key(tokens), DequantConfig) or default_config(arch, tokens)
        for dtype in (FP8, torch.float16):
            yield from dequant_launches(shape, tokens, config, META, gpu, dtype)
        if has_fp8(arch):
            fast = table.get("fast", shape.key(tokens), LayerConfig)
            invariant = default_layer_config(arch, tokens, batch_invariant=True)
            for choice in {fast or default_layer_config(arch, tokens), invariant}:
                yield from fast_launches(shape, tokens, choice, META, gpu)
                if tokens >= STEP_TOKENS:
                    yield from fast_launches(shape, tokens, choice, META, gpu, steps=STEPS)[-2:]
            yield from coordinator_launches(MoeConfig(), tokens, META)
    yield from adding_launches(shape.hidden_size, META)


def dequant_launches(
    shape: ExpertShape,
    tokens: int,
    config: DequantConfig,
    device: torch.device,
    gpu: Gpu,
    dtype: torch.dtype = FP8,
    swiglu_limit: float | None = None,
) -> list[Launch]:
    """The grouped products of the dequant pipeline with weights of `dtype`, and what they need before and after."""
    weights = random_weights(shape, device, dtype=dtype, swiglu_limit=swiglu_limit)
    batch = random_batch(shape, tokens, device)
    active = min(shape.num_experts, batch.expert_ids.numel())
    rows = sort_rows(batch.expert_ids, shape.num_experts, active, config.tile_m)
    sizes = (shape.num_experts, shape.hidden_size, shape.intermediate_size)
    pipeline = DequantPipeline(*sizes, device, gpu, dtype=dtype)
    return pipeline.grouped(batch, rows, weights, config)[0]


def fast_launches(
    shape: ExpertShape,
    tokens: int,
    config: LayerConfig,
    device: torch.device,
    gpu: Gpu,
    swiglu_limit: float | None = None,
    steps: int = 1,
) -> list[Launch]:
    """The fast pipeline."""
    weights = random_weights(shape, device, swiglu_limit=swiglu_limit)
    batch = random_batch(shape, tokens, device)
    workspace = Workspace.allocate(tokens, batch.expert_ids.shape[1], weights, config.tile_rows, device)
    sums = torch.empty(batch.hidden.shape, dtype=torch.float32, device=device)
    cut = layer_steps(batch, weights, sums, workspace, config, gpu.processors, steps)
    return [launch for step in cut for launch in step]


def coordinator_launches(model: MoeConfig, tokens: int, device: torch.device) -> list[Launch]:
    """Routing and activation quantisation."""
    hidden = torch.randn(tokens, model.hidden_size, device=device).bfloat16()
    quantized = torch.empty(tokens, model.hidden_size, dtype=FP8, device=device)
    scales = torch.empty(tokens, model.hidden_size // BLOCK, device=device)
    return [*routing_launches(model, tokens, device), quantize_activations(hidden, quantized, scales)]


def adding_launches(width: int, device: torch.device) -> list[Launch]:
    """Of two, four and eight GPUs' sums."""
    parts = [torch.empty(1, width, device=device) for _ in range(8)]
    outs = [torch.empty(1, width, dtype=dtype, device=device) for dtype in (torch.bfloat16, torch.float32)]
    return [add_parts(parts[:count], out) for count in (2, 4, 8) for out in outs]


def routing_launches(model: MoeConfig, tokens: int, device: torch.device) -> list[Launch]:
    """The choice of experts, and the weights alone where the family has layers that choose by token id."""
    logits = torch.randn(tokens, model.n_routed_experts, device=device)
    bias = torch.randn(model.n_routed_experts, device=device)
    ids = torch.empty(tokens, model.num_experts_per_tok, dtype=torch.int32, device=device)
    weights = torch.empty(ids.shape, device=device)
    launches = [route(logits, bias, ids, weights, model)]
    if model.family.table is not None:
        launches.append(weigh(logits, ids, weights, model))
    return launches
