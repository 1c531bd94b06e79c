"""Stream-ordered calls that fail: whoever waits is released within a second, gets NaN and then the error."""

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.sync import SyncCoordinator
from expertd.client.tools.cluster import Each, LocalCluster
from expertd.proto.base.errors import Cancelled, InvalidBatch, ServerFault, Unavailable, UnknownExpert
from tests.support.coordinators import EXACT, EXPERTS, LAYER, on_stream, routing, tokens
from tests.support.fence.markers import no_gpu
from tests.support.fleets import HALVES, addresses, flat, running_replicas, running_servers

pytestmark = no_gpu

HIDDEN_STATES = tokens(2).float()
IDS, WEIGHTS = routing(2)
FP8 = CoordinatorConfig(output_dtype=torch.float32)
CPU = ("--backend", "torch", "--threads", "1")


def cluster_of(model: Path, environment: Mapping[str, str]) -> LocalCluster:
    """Two servers; the second has the environment, too."""
    return LocalCluster(model, ["0-7", "8-15"], CPU, each=lambda index: Each(environment=environment if index else {}))


async def test_what_a_server_refuses_is_nan_and_raised_once(small_model: Path) -> None:
    async with running_servers(small_model, HALVES) as servers, Coordinator(addresses(servers), EXACT) as moe:
        await moe.prepare_stream(8, "cpu", timeout=5.0)
        expected = await on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS)
        infinite = WEIGHTS.clone()
        infinite[0, IDS[0].argmin()] = torch.inf
        wrong = pytest.raises(InvalidBatch, match=rf"{addresses(servers)[0]}: layer {LAYER}: weights\[0, \d\] is inf")
        assert (await on_stream(moe, HIDDEN_STATES, IDS, infinite)).isnan().all()
        with wrong:
            await moe.check()
        # The stream goes on; who does not check is told by the next call.
        assert torch.equal(await on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS), expected)
        assert (await on_stream(moe, HIDDEN_STATES, IDS, infinite)).isnan().all()
        with wrong:
            await on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS)
        assert torch.equal(await on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS), expected)
        await moe.check()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's, of NaN
@pytest.mark.parametrize("count", [3, 258])
async def test_a_call_of_nan_fails_alone(small_model: Path, count: int) -> None:
    """Its scales stay where later calls have rows that a server has no experts for, or none at all."""
    async with running_servers(small_model, HALVES) as servers, Coordinator(addresses(servers), FP8) as moe:
        await moe.prepare_stream(count, "cpu", timeout=20.0)
        hidden, (_, weights) = tokens(count).float(), routing(count)
        spread = torch.tensor([0, 1, 8, 9]).repeat(count, 1)
        assert (await on_stream(moe, torch.full_like(hidden, torch.nan), spread, weights)).isnan().all()
        with pytest.raises(InvalidBatch, match="hidden_scales"):
            await moe.check()
        # The second server has an expert for the first token alone.
        few = torch.tensor([0, 1, 2, 3]).repeat(count, 1)
        few[0] = spread[0]
        assert (await on_stream(moe, hidden, few, weights)).isfinite().all()
        await moe.check()
        # Rows that calls are padded with.
        rest = count - 1
        assert (await on_stream(moe, hidden[:rest], spread[:rest], weights[:rest])).isfinite().all()
        await moe.check()


@pytest.mark.parametrize("stranger", [EXPERTS, 1 << 20, -2])
async def test_experts_that_nobody_has_are_named_by_layer(small_model: Path, stranger: int) -> None:
    async with running_servers(small_model, HALVES) as servers, Coordinator(addresses(servers), EXACT) as moe:
        await moe.prepare_stream(8, "cpu", timeout=5.0)
        ids = IDS.clone()
        ids[1, 2] = stranger
        assert (await on_stream(moe, HIDDEN_STATES, ids, WEIGHTS)).isnan().all()
        with pytest.raises(UnknownExpert, match=f"layer {LAYER}: topk_ids names experts that no server has"):
            await moe.check()
        assert (await on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS)).isfinite().all()


async def test_a_receipt_that_differs_is_never_used(small_model: Path) -> None:
    async with (
        cluster_of(small_model, {"EXPERTD_FAILPOINTS": "wrong_receipt=1"}) as cluster,
        Coordinator(cluster.addresses, EXACT) as moe,
    ):
        await moe.prepare_stream(8, "cpu", timeout=5.0)
        assert (await on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS)).isnan().all()
        with pytest.raises(ServerFault, match=f"{cluster.addresses[1]}: layer {LAYER}: the receipt"):
            await moe.check()


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_a_wait_ends_within_a_second_of_its_servers_end(small_model: Path, blow: signal.Signals) -> None:
    async with (
        cluster_of(small_model, {"EXPERTD_FAILPOINTS": "delay=1:30"}) as cluster,
        Coordinator(cluster.addresses, EXACT) as moe,
    ):
        await moe.prepare_stream(8, "cpu", timeout=0.6)
        waiting = asyncio.create_task(on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS))
        await asyncio.sleep(0.2)
        assert not waiting.done()
        os.kill(cluster.servers[1].process.pid, blow)
        struck = time.monotonic()
        assert (await waiting).isnan().all()
        assert time.monotonic() - struck < 1.0
        with pytest.raises(Unavailable, match=f"{cluster.addresses[1]}: layer {LAYER}: "):
            await on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS)
        # Nor does any later call wait.
        assert (await on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS)).isnan().all()
        with pytest.raises(Unavailable):
            moe.stream_calls.check()
        if blow == signal.SIGSTOP:
            os.kill(cluster.servers[1].process.pid, signal.SIGCONT)


async def test_calls_go_on_with_a_replica(small_model: Path) -> None:
    async with running_replicas(small_model) as replicas:
        loop = asyncio.get_running_loop()

        def run() -> None:
            with SyncCoordinator(flat(replicas), EXACT) as moe:
                moe.prepare_stream(8, "cpu", timeout=2.0)
                expected = moe(LAYER, HIDDEN_STATES, topk_ids=IDS, topk_weights=WEIGHTS)
                tables = moe._coordinator.stream_calls._tables
                # However few of them are asked now.
                assert tables is not None
                assert tables.servers == len(flat(replicas))
                for gone in (0, 1):
                    loop.call_soon_threadsafe(replicas[gone][0].stop)
                    failed = 0
                    end = time.monotonic() + 2.0
                    while time.monotonic() < end:
                        try:
                            got = moe.on_stream(LAYER, HIDDEN_STATES, IDS, WEIGHTS)
                            moe.check()
                        except Unavailable:
                            failed += 1
                        else:
                            assert torch.equal(got, expected)
                    assert failed <= 1
                # Graphs that were captured read the same tables.
                assert moe._coordinator.stream_calls._tables is tables

        await asyncio.to_thread(run)


async def test_nobody_waits_for_a_coordinator_that_closes(small_model: Path) -> None:
    async with cluster_of(small_model, {"EXPERTD_FAILPOINTS": "delay=1:30"}) as cluster:
        moe = await Coordinator(cluster.addresses, EXACT).connect()
        await moe.prepare_stream(8, "cpu", timeout=20.0)
        waiting = asyncio.create_task(on_stream(moe, HIDDEN_STATES, IDS, WEIGHTS))
        await asyncio.sleep(0.2)
        # What was under way has failed, and close says so once everything is closed.
        with pytest.raises((Unavailable, Cancelled), match=f"layer {LAYER}: "):
            await moe.close()
        assert (await waiting).isnan().all()
        assert "not connected" in repr(moe)


async def test_other_calls_raise_it_too(small_model: Path) -> None:
    async with running_servers(small_model, HALVES) as servers, Coordinator(addresses(servers), EXACT) as moe:
        await moe.prepare_stream(8, "cpu", timeout=5.0)
        ids = IDS.clone()
        ids[0, 0] = EXPERTS
        await on_stream(moe, HIDDEN_STATES, ids, WEIGHTS)
        with pytest.raises(UnknownExpert):
            await moe(LAYER, HIDDEN_STATES, topk_ids=IDS, topk_weights=WEIGHTS)
        await moe(LAYER, HIDDEN_STATES, topk_ids=IDS, topk_weights=WEIGHTS)
