"""vLLM's OpenAI-compatible server, of two data parallel ranks, with experts on expertd servers, some of which die."""

import time
import urllib.error
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.process import free_port
from tests.system.vllm.adapters import for_expert, write_adapter
from tests.system.vllm.engines import HALVES, TOKENS, Api, api, prompts, shard
from tests.system.vllm.models import continued

REQUESTS, ASKED = 200, 24
BACK_SECONDS = 30.0


class Fleet:
    """A server of the lower experts, and two of the upper ones, which can be killed and started again."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._model, self._folder = model, folder
        self._ports = {name: free_port() for name in ("low", "high", "replica")}
        self._stacks: dict[str, ExitStack] = {}
        self._starts = 0

    @property
    def servers(self) -> str:
        return ",".join(f"127.0.0.1:{port}" for port in self._ports.values())

    def start(self, name: str) -> None:
        self._starts += 1
        stack = self._stacks[name] = ExitStack()
        folder = self._folder / f"{name}-{self._starts}"
        self._running = stack.enter_context(shard(self._model, folder, HALVES[name != "low"], self._ports[name]))
        stack.callback(self._running.process.kill)

    def kill(self, name: str) -> None:
        self._stacks.pop(name).close()

    def close(self) -> None:
        for stack in self._stacks.values():
            stack.close()


@pytest.fixture(scope="module")
def fleet(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    fleet = Fleet(models["qwen3_moe"], tmp_path_factory.mktemp("fleet"))
    try:
        for name in ("low", "high", "replica"):
            fleet.start(name)
        yield fleet
    finally:
        fleet.close()


@pytest.fixture(scope="module")
def vllm(
    python: Path, models: dict[str, Path], fleet: Fleet, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Api]:
    log = tmp_path_factory.mktemp("vllm") / "log"
    options = ("--enforce-eager", "--data-parallel-size", "2", "--enable-lora")
    with api(python, models["qwen3_moe"], log, fleet.servers, *options) as one:
        yield one


def test_eight_at_once_streamed_or_not_are_answered_as_by_local_experts(vllm: Api) -> None:
    with ThreadPoolExecutor(8) as threads:
        told = list(threads.map(lambda prompt: vllm.ask(prompt, TOKENS), prompts()))
        streamed = list(threads.map(lambda prompt: vllm.ask(prompt, TOKENS, stream=True), prompts()))
    assert told == streamed == [continued(prompt, TOKENS) for prompt in prompts()]


def test_an_adapter_of_experts_is_refused_and_the_engine_lives(
    vllm: Api, models: dict[str, Path], tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", models["qwen3_moe"], "q_proj")
    for_expert(adapter, 3)
    with pytest.raises(urllib.error.HTTPError) as failure:
        vllm.load_adapter("experts", adapter)
    said = failure.value.read().decode()
    assert "expected target modules in" in said, said
    assert "mlp.experts" in said.partition("but received")[2], said
    assert vllm.ask(prompts()[3], ASKED) == continued(prompts()[3], ASKED)


def test_a_replica_killed_and_started_again_costs_no_request(vllm: Api, fleet: Fleet) -> None:
    asked = [prompts()[number % 8] for number in range(REQUESTS)]
    with ThreadPoolExecutor(REQUESTS) as threads:
        answers = [threads.submit(vllm.ask, prompt, ASKED) for prompt in asked]
        while (before := sum(answer.done() for answer in answers)) < REQUESTS // 10:
            time.sleep(0.02)
        fleet.kill("replica")
        killed = sum(answer.done() for answer in answers)
        fleet.start("replica")
        told = [answer.result() for answer in answers]
    print(f"of {REQUESTS} requests {before} were answered before the kill, {REQUESTS - killed} after it")
    assert killed < REQUESTS
    assert told == [continued(prompt, ASKED) for prompt in asked]


def test_without_an_owner_requests_fail_and_the_engine_lives(vllm: Api, fleet: Fleet) -> None:
    prompt = prompts()[7]
    fleet.kill("low")
    with pytest.raises(urllib.error.HTTPError) as failure:
        vllm.ask(prompt, ASKED)
    said = failure.value.read().decode()
    assert failure.value.code == 503, said
    assert "experts could not be computed" in said
    assert "has no owner" in said or "have no owner" in said or "no server" in said, said
    assert vllm.health() == 503
    fleet.start("low")
    deadline = time.monotonic() + BACK_SECONDS
    while vllm.health() != 200:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    # Nothing of the failed passes is left in its prefix cache.
    assert _once_owned(vllm, prompt, deadline) == continued(prompt, ASKED)


def _once_owned(vllm: Api, prompt: list[int], deadline: float) -> list[int]:
    """What is answered once the ranks, too, have found the server that health has found."""
    while True:
        try:
            return vllm.ask(prompt, ASKED)
        except urllib.error.HTTPError as failure:
            if failure.code != 503 or time.monotonic() > deadline:
                raise
