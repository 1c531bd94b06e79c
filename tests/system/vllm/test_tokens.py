"""vLLM generates with experts on expertd servers what it generates with its own, in each of its ways to run."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from expertd.kernels.model.config import MoeConfig
from tests.system.vllm.adapters import ATTENTION, below_best, write_adapter
from tests.system.vllm.engines import TOKENS, generate, prompts, run, two_servers
from tests.system.vllm.environment import ROOT, variables
from tests.system.vllm.models import FAMILIES, continued

WAYS: dict[str, dict[str, Any]] = {
    # Prompts come in chunks, beginnings are shared, tokens are guessed, there may be adapters.
    "qwen3_moe": {
        "enable_lora": True,
        "max_num_batched_tokens": 32,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    },
    # With shared experts, over two tensor parallel ranks.
    "deepseek_v3": {"tensor_parallel_size": 2},
}


NEAR = 0.2
"""How far the logit of BF16's best token may be below that of FP32's; those of other tokens are some 14 below."""


@pytest.mark.parametrize("family", FAMILIES)
def test_remote_experts_give_the_tokens_of_local_ones(
    python: Path, models: dict[str, Path], family: str, tmp_path: Path
) -> None:
    # The plug-in is there, too, and is told of no servers.
    local = generate(python, models[family], tmp_path)
    adapter = write_adapter(tmp_path / "adapter", models[family], *ATTENTION) if "enable_lora" in WAYS[family] else None
    with two_servers(models[family], tmp_path) as servers:
        remote = generate(python, models[family], tmp_path, servers, adapter, **WAYS[family])
    assert local.tokens == [continued(prompt, TOKENS) for prompt in prompts()]
    assert remote.tokens == local.tokens
    for prompt, chosen in zip(prompts(), remote.adapted, strict=adapter is not None):
        assert below_best(models[family], prompt, chosen, adapter).max() < NEAR
        assert below_best(models[family], prompt, chosen).median() > NEAR
    print(f"{family}: ready in {local.seconds:.1f} s with local experts, {remote.seconds:.1f} s with remote ones")
    config = MoeConfig.from_json(models[family] / "config.json")
    assert "on expertd servers" not in local.log
    assert f"the experts of {len(config.moe_layers)} layers are on expertd servers" in remote.log


def test_a_compiled_graph_has_the_calls_in_it(python: Path, models: dict[str, Path], tmp_path: Path) -> None:
    with two_servers(models["qwen3_moe"], tmp_path) as servers:
        remote = generate(python, models["qwen3_moe"], tmp_path, servers, enforce_eager=False)
    assert remote.tokens == [continued(prompt, TOKENS) for prompt in prompts()]


@pytest.mark.parametrize("program", ["failing", "apart"])
def test_calls_that_fail_and_those_of_two_engines(python: Path, program: str) -> None:
    subprocess.run([python, ROOT / f"tests/system/vllm/{program}.py"], env=variables(), check=True)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("--enable-expert-parallel", {"enable_expert_parallel": True, "tensor_parallel_size": 2}),
        ("--runner pooling", {"runner": "pooling"}),
    ],
)
def test_what_cannot_be_with_remote_experts_is_refused_with_what_to_do(
    python: Path, models: dict[str, Path], tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    done = run(python, models["qwen3_moe"], tmp_path, "127.0.0.1:1", **options)
    assert done.returncode != 0
    assert f"{name} cannot be used with experts on expertd servers" in done.stdout


def test_servers_of_another_model_are_refused_before_the_first_token(
    python: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    with two_servers(models["deepseek_v3"], tmp_path) as servers:
        done = run(python, models["qwen3_moe"], tmp_path, servers)
    assert done.returncode != 0
    assert "model_type is 'qwen3_moe' in vLLM's model and 'deepseek_v3' on the expertd servers" in done.stdout
