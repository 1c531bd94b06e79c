"""Every kernel of both pipelines and of the coordinator once, on shapes small enough for compute-sanitizer.

compute-sanitizer --tool memcheck python -m tests.gpu.small_shapes
compute-sanitizer --tool racecheck python -m tests.gpu.small_shapes
"""

import torch

from expertd.kernels.cutile.base.launch import Gpu
from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.dequant.layer import DequantPipeline, default_config
from expertd.kernels.cutile.fast.layer import Workspace, layer_launches
from expertd.kernels.cutile.fast.tiles import BOTH, FEW, FEW_8, PAIRED, SINGLE, WIDE, LayerConfig
from expertd.kernels.cutile.tools.inputs import random_batch, random_weights
from expertd.kernels.cutile.tools.registry import coordinator_launches
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.oracle.reference import reference_partials, relative_error
from tests.support.kernels.routings import ROUTINGS

SHAPE = ExpertShape(5, 384, 128)
FAST_SHAPE = ExpertShape(5, 512, 256)
CUDA = torch.device("cuda")


def main() -> None:
    gpu = Gpu.of(CUDA)
    weights = random_weights(SHAPE, CUDA)
    pipeline = DequantPipeline(SHAPE.num_experts, SHAPE.hidden_size, SHAPE.intermediate_size, CUDA, gpu)
    for tokens, config in ((1, default_config(gpu.arch, 1)), (67, default_config(gpu.arch, 16384))):
        batch = random_batch(SHAPE, tokens, CUDA, model_experts=10, top_k=4)
        error = relative_error(pipeline(batch, weights, config).sums, reference_partials(batch, weights))
        print(f"{tokens} tokens: relative error {error:.2e}")
        for model in (MoeConfig(), ROUTINGS["Qwen3-Next"], ROUTINGS["DeepSeek-V4-Flash"]):
            for launch in coordinator_launches(model, tokens, CUDA):
                launch()
    fast = (
        (1, SINGLE),
        (9, FEW_8),
        (67, LayerConfig(16, FEW, FEW)),
        (140, LayerConfig(64, BOTH, PAIRED, overlaps=True)),
        (150, LayerConfig(64, PAIRED, PAIRED)),
        (200, LayerConfig(128, WIDE, WIDE)),
    )
    fast_weights = random_weights(FAST_SHAPE, CUDA)
    for tokens, choice in fast:
        batch = random_batch(FAST_SHAPE, tokens, CUDA, model_experts=10, top_k=4)
        workspace = Workspace.allocate(tokens, 4, fast_weights, choice.tile_rows, CUDA)
        sums = torch.empty(batch.hidden.shape, device=CUDA)
        for launch in layer_launches(batch, fast_weights, sums, workspace, choice, gpu.processors):
            launch()
        error = relative_error(sums, reference_partials(batch, fast_weights))
        print(f"fast, {tokens} tokens: relative error {error:.2e}")
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
