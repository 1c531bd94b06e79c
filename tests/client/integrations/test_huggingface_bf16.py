"""A BF16 checkpoint served as it is: the tokens are those of the model with local experts, from the same files."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import torch

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.integrations.huggingface import NAME, register, unregister
from expertd.kernels.oracle.reference import relative_error
from tests.support.families import write_family
from tests.support.generation import generate, in_thread, load, logits, prompts, round_inputs
from tests.support.serving import running_server

EXACT = CoordinatorConfig(hidden_dtype=torch.bfloat16, reply_dtype=torch.float32)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_family(tmp_path_factory.mktemp("bf16"), "qwen3_moe").plain


@pytest.fixture
async def servers(plain: Path) -> AsyncIterator[list[str]]:
    async with (
        running_server(plain, range(8), weights="bf16") as low,
        running_server(plain, range(8, 16), weights="bf16") as high,
    ):
        yield [str(low.address), str(high.address)]
        unregister()


async def test_tokens_and_logits_are_those_of_the_bf16_checkpoint(
    servers: list[str], plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare() -> None:
        local = load(plain, "eager", dtype=torch.float32)
        round_inputs(monkeypatch, local)
        with register(servers, EXACT):
            remote = load(plain, NAME, dtype=torch.float32)
            for seed in range(3):
                asked = prompts(4, seed=seed)
                tokens = generate(local, asked)
                assert torch.equal(generate(remote, asked), tokens)
                error = relative_error(logits(remote, tokens), logits(local, tokens))
                print(f"relative error of the logits {error:.1e}")
                assert error < 1e-4

    await in_thread(compare)


async def test_rounded_to_fp8_the_same_checkpoint_gives_other_logits(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(addresses: list[str]) -> None:
        local = load(plain, "eager", dtype=torch.float32)
        round_inputs(monkeypatch, local)
        with register(addresses, EXACT):
            error = relative_error(logits(load(plain, NAME, dtype=torch.float32), prompts()), logits(local, prompts()))
        assert error > 1e-2

    async with running_server(plain, range(16)) as server:
        await in_thread(lambda: compare([str(server.address)]))
        unregister()
