"""vLLM generates with experts on expertd servers what it generates with its own, in each of its ways to run."""

from pathlib import Path
from typing import Any

import pytest

from tests.system.vllm.engines import TOKENS, Generated, generate, prompts, run, two_servers
from tests.system.vllm.models import FAMILIES, continued

WAYS: dict[str, dict[str, Any]] = {
    # Chunks of prompts, shared beginnings and guessed tokens, over two tensor parallel ranks.
    "qwen3_moe": {
        "tensor_parallel_size": 2,
        "max_num_batched_tokens": 32,
        "speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3},
    },
    # With the graph traced, over two pipeline parallel ranks.
    "deepseek_v3": {"enforce_eager": False, "pipeline_parallel_size": 2},
}


@pytest.fixture(scope="module", params=[*FAMILIES])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def local(python: Path, models: dict[str, Path], family: str, tmp_path_factory: pytest.TempPathFactory) -> Generated:
    """By vLLM's own experts; the plug-in is there and is told of no servers."""
    return generate(python, models[family], tmp_path_factory.mktemp("local"))


def test_remote_experts_give_the_tokens_of_local_ones(
    python: Path, models: dict[str, Path], family: str, local: Generated, tmp_path: Path
) -> None:
    with two_servers(models[family], tmp_path) as servers:
        remote = generate(python, models[family], tmp_path, servers, **WAYS[family])
    assert local.tokens == [continued(prompt, TOKENS) for prompt in prompts()]
    assert remote.tokens == local.tokens
    assert "EXPERTD" not in local.log
    times = f"{local.seconds:.1f} s and {remote.seconds:.1f} s"
    print(
        f"{family}: weights {local.weights} GiB with local experts and {remote.weights} GiB without, ready in {times}"
    )
    assert float(remote.weights) < float(local.weights)


def test_what_cannot_be_with_remote_experts_is_refused_with_what_to_do(
    python: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    done = run(python, models["qwen3_moe"], tmp_path, "127.0.0.1:1", enable_expert_parallel=True)
    assert done.returncode != 0
    assert "--enable-expert-parallel cannot be used with experts on expertd servers" in done.stdout


def test_servers_of_another_model_are_refused_before_the_first_token(
    python: Path, models: dict[str, Path], tmp_path: Path
) -> None:
    with two_servers(models["deepseek_v3"], tmp_path) as servers:
        done = run(python, models["qwen3_moe"], tmp_path, servers)
    assert done.returncode != 0
    assert "model_type is 'qwen3_moe' in vLLM's model and 'deepseek_v3' on the expertd servers" in done.stdout
