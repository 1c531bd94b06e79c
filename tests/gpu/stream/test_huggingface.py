"""transformers' models whose calls are work on their GPU's stream: the bits of other calls."""

import asyncio
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import FineGrainedFP8Config

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.integrations.huggingface import NAME, register
from expertd.client.tools.cluster import LocalCluster
from tests.gpu.caller import GPU
from tests.support.families import write_family
from tests.support.fence.markers import gpu_only
from tests.support.generation import generate, load, logits, prompts

pytestmark = gpu_only


@pytest.mark.parametrize("family", ["glm4_moe", "qwen3_moe"])
async def test_logits_and_tokens_are_those_of_other_calls(family: str, tmp_path: Path) -> None:
    """The first has shared experts, which are computed beside the call."""
    folder = write_family(tmp_path, family).quantized

    def answers(addresses: list[str], stream_tokens: int) -> tuple[Tensor, Tensor, bool]:
        with register(addresses, CoordinatorConfig(), stream_tokens=stream_tokens) as remote:
            dequantized = FineGrainedFP8Config(dequantize=True)
            model = load(folder, NAME, quantization_config=dequantized, dtype=torch.bfloat16).to(GPU)
            ids = prompts().to(GPU)
            results = logits(model, ids).cpu(), generate(model, ids).cpu()
            return *results, remote._moe._coordinator._stream_calls is not None

    options = ["--backend", "cutile", "--batch-invariant"]
    async with LocalCluster(folder, ["0-7", "8-15"], options) as cluster:
        expected, tokens, on_stream = await asyncio.to_thread(answers, cluster.addresses, 0)
        assert not on_stream
        got, others, on_stream = await asyncio.to_thread(answers, cluster.addresses, 64)
        assert on_stream
        assert torch.equal(got, expected)
        assert torch.equal(others, tokens)
