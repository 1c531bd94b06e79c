"""The public names: typed, lazy, described, alike with and without await, and usable in notebooks."""

import ast
import inspect
import io
import pydoc
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
import torch

import expertd
from expertd import (
    ClientSecurity,
    Coordinator,
    CoordinatorConfig,
    ExpertdError,
    Gate,
    InvalidBatch,
    MoeResult,
    ServerReport,
    SyncCoordinator,
    Unavailable,
)
from expertd.client.call.result import Effort
from expertd.client.tools.cluster import LocalCluster
from expertd.proto.codec import StageTimings

IDS, WEIGHTS = torch.tensor([[0, 5, 9, 15]]), torch.full((1, 4), 0.25)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def servers(small_model: Path) -> AsyncIterator[list[str]]:
    """Addresses of two server processes: this process's loop may then be blocked."""
    async with LocalCluster(small_model, ["0-7", "8-15"], ["--backend", "torch", "--threads", "1"]) as cluster:
        yield cluster.addresses


def test_the_names_for_the_type_checker_are_those_at_run_time() -> None:
    source = ast.parse(Path(expertd.__file__).read_text())
    typed = [
        alias.name
        for block in source.body
        if isinstance(block, ast.If)
        for statement in block.body
        if isinstance(statement, ast.ImportFrom)
        for alias in statement.names
    ]
    assert sorted(typed) == sorted(expertd.__all__)
    for name in expertd.__all__:
        assert getattr(expertd, name).__name__ == name


def test_an_unknown_name_is_answered_with_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'Coordinater'; public names: .*Coordinator"):
        expertd.__getattr__("Coordinater")


def test_importing_expertd_does_not_import_torch() -> None:
    code = "import sys, expertd; assert 'torch' not in sys.modules; expertd.Gate; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


@pytest.mark.parametrize("name", expertd.__all__)
def test_help_says_what_it_is(name: str) -> None:
    thing = getattr(expertd, name)
    shown = io.StringIO()
    pydoc.Helper(output=shown).help(thing)
    assert inspect.getdoc(thing) is not None
    assert not (inspect.getdoc(thing) or "").startswith(f"{name}("), "a docstring of its own, not a dataclass's"
    assert (inspect.getdoc(thing) or "").splitlines()[0] in shown.getvalue()
    for member, value in inspect.getmembers(
        thing, lambda value: inspect.isfunction(value) or isinstance(value, property)
    ):
        assert member.startswith("_") or inspect.getdoc(value), f"{name}.{member} has no docstring"


def test_both_coordinators_have_the_same_members_and_arguments() -> None:
    def arguments(value: Any) -> list[str]:  # noqa: ANN401
        return [str(argument) for argument in inspect.signature(getattr(value, "fget", value)).parameters.values()]

    def members(kind: type) -> dict[str, list[str]]:
        public = {name: getattr(kind, name) for name in dir(kind) if not name.startswith("_") or name == "__call__"}
        return {name: arguments(value) for name, value in public.items()}

    # What the synchronous one calls itself, and what only an event loop has a use for.
    apart = {"stream_calls", "submit_here", "transports"}
    awaited = {name: value for name, value in members(Coordinator).items() if name not in apart}
    assert members(SyncCoordinator) == awaited


def test_reprs_are_short_and_tell_what_matters() -> None:
    gate = Gate(torch.zeros(256, 7168), torch.zeros(256))
    assert repr(gate) == "Gate(256 experts, hidden size 7168)"
    assert "gates={3: Gate(256 experts, hidden size 7168)}" in repr(CoordinatorConfig(gates={3: gate}))
    report = ServerReport("node0:1", 2, 3, 0.0123, StageTimings())
    result = MoeResult(torch.zeros(2, 8, dtype=torch.bfloat16), (report,), Effort())
    assert repr(result) == "MoeResult(output [2, 8] torch.bfloat16; node0:1 12.3 ms)"
    assert repr(replace(result, degraded_tokens=1)).endswith("12.3 ms; 1 tokens lack experts)")
    assert repr(SyncCoordinator(["node0:1"])) == "SyncCoordinator(['node0:1'], not connected)"
    assert "secret" not in repr(ClientSecurity(token="secret"))


async def test_the_synchronous_one_works_where_a_loop_is_running(servers: list[str]) -> None:
    hidden = torch.randn(1, 256)
    async with Coordinator(servers) as awaited:
        expected = await awaited(1, hidden, topk_ids=IDS, topk_weights=WEIGHTS)
    # As in cells of a notebook, whose loop is running while they run.
    moe = SyncCoordinator(servers).connect()
    assert moe.connect() is moe
    assert torch.equal(moe(1, hidden, topk_ids=IDS, topk_weights=WEIGHTS), expected)
    assert moe.backends == {"torch"}
    moe.close()
    moe.close()
    with pytest.raises(RuntimeError, match=r"not connected; use it in 'with SyncCoordinator.* or connect\(\) first"):
        moe(1, hidden, topk_ids=IDS, topk_weights=WEIGHTS)
    with moe:
        assert torch.equal(moe(1, hidden, topk_ids=IDS, topk_weights=WEIGHTS), expected)


async def test_the_awaited_one_works_without_a_block(servers: list[str]) -> None:
    moe = await Coordinator(servers).connect()
    assert await moe.connect() is moe
    assert (await moe(1, torch.randn(3, 256), topk_ids=IDS.expand(3, 4), topk_weights=WEIGHTS.expand(3, 4))).shape == (
        3,
        256,
    )
    await moe.close()
    with pytest.raises(RuntimeError, match=r"not connected; use it in 'async with Coordinator.* or connect\(\) first"):
        await moe(1, torch.randn(1, 256), topk_ids=IDS, topk_weights=WEIGHTS)


def test_a_script_that_never_closes_ends_cleanly(servers: list[str]) -> None:
    code = f"""
import torch
from expertd import SyncCoordinator
moe = SyncCoordinator({servers!r}).connect()
print(moe(1, torch.randn(1, 256), topk_ids=torch.tensor([[0, 9]]), topk_weights=torch.ones(1, 2)).shape)
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == "torch.Size([1, 256])\n"


def test_errors_say_what_to_do(servers: list[str]) -> None:
    with pytest.raises(ValueError, match="servers is 'node0:1'; give a list with at least one host:port"):
        Coordinator("node0:1")
    config = CoordinatorConfig(connect_timeout=0.3)
    with pytest.raises(Unavailable, match=r"^127\.0\.0\.1:1: "):
        SyncCoordinator(["127.0.0.1:1"], config).connect()
    with SyncCoordinator(servers) as moe:
        for arguments, complaint in (
            (
                (1, np.zeros((1, 256))),
                r"hidden has type ndarray; give a torch tensor, such as torch\.as_tensor\(hidden\)",
            ),
            ((1, torch.zeros(1, 100)), r"must be a float tensor \[\.\.\., 256\] with at least one row"),
            ((1, torch.zeros(1, 256)), r"layer 1 has no gate; give gates in CoordinatorConfig, or topk_ids and topk_w"),
        ):
            with pytest.raises(InvalidBatch, match=complaint):
                moe(*arguments)
        with pytest.raises(ExpertdError, match=r"layer 9 is on no server; layers served: \[1, 2\]"):
            moe(9, torch.zeros(1, 256))
