"""`expertd rollout`: servers that take other weights and use them, back, and on from wherever it was stopped."""

import argparse
import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from expertd.client.coordinator import Coordinator
from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.client.tools.rollout import Fleet, InvalidRollout, add_arguments, rollout, run
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.oracle.reference import relative_error
from expertd.proto.base.errors import ModelMismatch
from expertd.server.admin.holdings import Change
from expertd.server.app import Server
from expertd.server.scheduling.generations import Generations
from tests.docs.fences import ROOT, Fence
from tests.support.coordinators import QUICK, call, expected
from tests.support.families import SMALL
from tests.support.fleets import HALVES, addresses, running_servers
from tests.support.serving import ANY_PORT

PLAIN = ClientSecurity()


@pytest.fixture(scope="module")
def next_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the small model's shape, with other weights."""
    return write_demo_checkpoint(tmp_path_factory.mktemp("next"), replace(SMALL, seed=SMALL.seed + 1))


@pytest.fixture
async def servers(small_model: Path) -> AsyncIterator[list[Server]]:
    async with running_servers(small_model, HALVES, admin_listen=ANY_PORT) as servers:
        yield servers


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(options)


def generations(servers: list[Server]) -> list[tuple[int, float]]:
    """How many each has, and the share of calls for the next one."""
    return [(len(one.info.fingerprints), one.info.next.share if one.info.next else 0.0) for one in servers]


async def test_the_manual_rolls_out_and_back(servers: list[Server], small_model: Path, next_model: Path) -> None:
    text = (ROOT / "docs/operations.md").read_text()
    (fence,) = (fence for fence in Fence.all_of(text) if fence.mark == "run by tests/client/tools/test_rollout.py")
    told = fence.code.replace("/models/new", str(next_model))
    for name, address in zip(("node0:50051", "node1:50051"), addresses(servers), strict=True):
        told = told.replace(name, address)
    first, everywhere, release = [line.split()[2:] for line in told.strip().splitlines()]
    former = servers[0].info.model_fingerprint
    async with Coordinator(addresses(servers), QUICK) as moe:
        await rollout(parsed(*first))
        assert generations(servers) == [(2, 0.05)] * 2
        with pytest.raises(InvalidRollout, match="calls use both generations"):
            await rollout(parsed(*release))
        await rollout(parsed(*everywhere))
        await call(moe)
        assert relative_error(await call(moe), expected(next_model)) < 1e-5
        await rollout(parsed(*addresses(servers), "--back"))
        assert generations(servers) == [(2, 0.0)] * 2
        await call(moe)
        assert relative_error(await call(moe), expected(small_model)) < 1e-5
        await rollout(parsed(*everywhere))
        await rollout(parsed(*release))
        assert generations(servers) == [(1, 0.0)] * 2
        assert relative_error(await call(moe), expected(next_model)) < 1e-5
        assert former not in {one.info.model_fingerprint for one in servers}


async def test_it_goes_on_from_what_servers_have(servers: list[Server], next_model: Path) -> None:
    part = Fleet(addresses(servers[:1]), PLAIN, PLAIN)
    await part.stage(str(next_model))
    with pytest.raises(InvalidRollout, match=r"not every expert of .* has an owner among these servers"):
        await part.use(1.0)
    whole = Fleet(addresses(servers), PLAIN, PLAIN)
    with pytest.raises(InvalidRollout, match="have no next generation: --model DIR takes it there"):
        await whole.use(1.0)
    epoch = servers[0].info.placement_epoch
    await whole.stage(str(next_model))
    assert servers[0].info.placement_epoch == epoch
    await whole.use(1.0)
    # One was released, and then it was stopped.
    held = servers[0].holdings
    await held.switch(Generations(held.generations.all[1]), Change(), "released")
    await whole.release()
    assert generations(servers) == [(1, 0.0)] * 2
    assert len({one.info.model_fingerprint for one in servers}) == 1
    await whole.release()


async def test_all_take_the_same_weights(servers: list[Server], next_model: Path, tmp_path: Path) -> None:
    third = write_demo_checkpoint(tmp_path / "third", replace(SMALL, seed=SMALL.seed + 2))
    await Fleet(addresses(servers[:1]), PLAIN, PLAIN).stage(str(next_model))
    with pytest.raises(ModelMismatch, match=r"holds weights .*; model_fingerprint is"):
        await Fleet(addresses(servers), PLAIN, PLAIN).stage(str(third))
    assert generations(servers) == [(2, 0.0), (1, 0.0)]


async def test_what_cannot_be_is_told(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running_servers(small_model, HALVES) as servers:
        code = await asyncio.to_thread(run, parsed(*addresses(servers), "--back"))
    assert code == 2
    assert "has no administration; start it with --admin-listen" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed("a:1", "--model", "x", "--share", "1.5")
    assert "1.5 is no share; it must be from 0 to 1" in capsys.readouterr().err
