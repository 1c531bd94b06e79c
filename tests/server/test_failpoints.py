"""Faults on purpose: read from the environment alone, repeatable, and each what it says."""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from torch import Tensor

from expertd.client.tools.cluster import LocalCluster
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.interface import Transport
from expertd.client.transport.shared_memory import HOST, SharedMemoryTransport
from expertd.proto.base.errors import DeadlineExceeded, ExpertdError, ServerFault, StalePlacement, Unavailable
from expertd.proto.codec import ShardInfo
from expertd.server.failpoints import SECONDS, VARIABLE, parse_failpoints
from expertd.server.options.config import InvalidOption
from tests.support.serving import call_for, random_batch, running_server, until

EXPERTS = range(16)
BATCH = random_batch(2, 256, 16, 4)
WAYS = pytest.mark.parametrize("way", ["grpc", "lane"])


@contextlib.asynccontextmanager
async def way_to(address: str, way: str, *, checked: bool = False) -> AsyncIterator[tuple[Transport, ShardInfo]]:
    """To a server: over gRPC, or through memory that is shared, with checksums if `checked`."""
    grpc = GrpcTransport(address)
    transport = SharedMemoryTransport(grpc, 1 << 24, checked=checked) if way == "lane" else grpc
    try:
        shard = await transport.get_shard(10.0)
        assert (HOST in transport.shared_devices) == (way == "lane")
        yield transport, shard
    finally:
        await transport.close()


def strikes(text: str, kind: str = "delay") -> list[bool]:
    failpoints = parse_failpoints(text)
    return [failpoints.strikes(kind) for _ in range(200)]


def test_a_seed_repeats_its_faults_whatever_other_kinds_there_are() -> None:
    once = strikes("delay=0.3,seed=4")
    assert once == strikes("seed=4,reset=0.5,delay=0.3:9")
    assert once != strikes("delay=0.3,seed=5")
    assert 30 < sum(once) < 90
    assert not any(strikes("delay=0.3", kind="reset"))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("explode=1", f"{VARIABLE} names 'explode'; choose from {', '.join(SECONDS)}"),
        ("delay", r"has delay=; it must be probability\[:seconds\]"),
        ("delay=1:x", r"has delay=1:x; it must be probability\[:seconds\]"),
        ("delay=1.5", r"has delay=1\.5; a probability is from 0 to 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(InvalidOption, match=complaint):
        parse_failpoints(text)


async def test_without_the_variable_a_server_has_none_of_it(small_model: Path) -> None:
    async with running_server(small_model, range(16)) as server:
        assert server.failpoints is None
        assert type(server.backend).__name__ == "TorchBackend"


async def no_look() -> None:
    """Of a watchdog that takes no notice."""


@WAYS
@pytest.mark.parametrize(
    ("fault", "kind", "complaint"),
    [
        ("drop=1", DeadlineExceeded, r"no answer within 0\.5 s"),
        ("delay=1:1", DeadlineExceeded, r"no answer within 0\.5 s"),
        ("reset=1", Unavailable, "reset|closed|EOF|failed to connect|ended"),
        ("stale_epoch=1", StalePlacement, r"placement_epoch is \d+; the current one is \d+"),
        ("device_error=1", ServerFault, "the device failed: RuntimeError: failpoint device_error"),
    ],
)
async def test_faults_reach_the_caller_as_errors(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, fault: str, kind: type[ExpertdError], complaint: str, way: str
) -> None:
    monkeypatch.setenv(VARIABLE, fault)
    async with running_server(small_model, range(16), drain_seconds=0.2) as server:
        # An error that ends the server is for the tests of the watchdog.
        monkeypatch.setattr(server.watchdog, "_look", no_look)
        async with way_to(str(server.address), way) as (transport, _):
            call = call_for(server, random_batch(2, 256, 16, 4), timeout=0.5)
            with pytest.raises(kind, match=complaint):
                await transport.execute(call)
            # What is withheld is let go of when its caller gives up, not when its time has come.
            await until(lambda: server.journal.in_flight == 0)


async def sums(
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    way: str,
    *,
    on_thread: bool = False,
    checked: bool = False,
) -> Tensor:
    monkeypatch.setenv(VARIABLE, fault)
    async with (
        running_server(model, EXPERTS) as server,
        way_to(str(server.address), way, checked=checked) as (transport, _),
    ):
        call = call_for(server, BATCH)
        if on_thread and isinstance(transport, SharedMemoryTransport):
            result = await asyncio.to_thread(transport.call, call)
            assert result is not None
            return result.partials
        return (await transport.execute(call)).partials.clone()


@WAYS
@pytest.mark.parametrize("on_thread", [False, True])
@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("corrupt_reply=1", "altered on its way: its checksum does not match its partials"),
        (
            "corrupt_request=1",
            r"tensors_checksum is 0x[0-9a-f]{8}; the tensors that came have 0x[0-9a-f]{8}: the request was altered",
        ),
    ],
)
async def test_a_flipped_bit_does_not_pass_the_checksum(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, fault: str, complaint: str, way: str, on_thread: bool
) -> None:
    with pytest.raises(ServerFault, match=complaint):
        await sums(small_model, monkeypatch, fault, way, on_thread=on_thread, checked=True)
    # What is wrong is the bit alone.
    await sums(small_model, monkeypatch, "delay=0", way, on_thread=on_thread, checked=True)


@pytest.mark.parametrize("fault", ["corrupt_reply", "corrupt_request"])
async def test_a_bit_is_flipped_in_shared_memory_that_has_no_checksum(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    right = await sums(small_model, monkeypatch, f"{fault}=0", "lane")
    wrong = await sums(small_model, monkeypatch, f"{fault}=1", "lane")
    changed = (right != wrong).any(dim=1).sum() if fault == "corrupt_request" else (right != wrong).sum()
    assert changed == 1


@WAYS
async def test_a_wrong_receipt_passes_the_checksum_and_claims_pairs_that_were_not_sent(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv(VARIABLE, "wrong_receipt=1")
    async with running_server(small_model, range(16)) as server, way_to(str(server.address), way) as (transport, _):
        result = await transport.execute(call_for(server, random_batch(2, 256, 16, 4)))
    assert result.receipt[0] == 3


@WAYS
async def test_a_late_answer_keeps_nobody_else_waiting(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    # With this seed the first one is late, and the second is not.
    monkeypatch.setenv(VARIABLE, "delay=0.5:1,seed=10")
    now: Callable[[], float] = asyncio.get_running_loop().time
    async with running_server(small_model, EXPERTS) as server, way_to(str(server.address), way) as (transport, _):
        started, late = now(), asyncio.create_task(transport.execute(call_for(server, BATCH)))
        await until(lambda: server.journal.in_flight == 1)
        await transport.execute(call_for(server, BATCH, request_id=8))
        assert not late.done()
        assert len((await late).partials) == 2
        assert 1 <= now() - started < 4


@WAYS
@pytest.mark.parametrize("kind", ["crash_before", "crash_after"])
async def test_a_crash_is_told_and_ends_the_process(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, kind: str, way: str
) -> None:
    monkeypatch.setenv(VARIABLE, f"{kind}=1")
    async with LocalCluster(small_model, ["0-15"], ["--backend", "torch", "--threads", "1"]) as cluster:
        async with way_to(cluster.addresses[0], way) as (transport, shard):
            with pytest.raises(Unavailable):
                await transport.execute(call_for(shard, BATCH))
        server = cluster.servers[0]
        assert await asyncio.wait_for(server.process.wait(), 20) == -signal.SIGKILL
        assert server.log.read_text().count(f"failpoint {kind} strikes\n") == 1


@WAYS
async def test_a_stuck_device_is_unavailable_until_it_goes_on(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setenv(VARIABLE, "stuck_device=1:1.6")

    told = "closed" if way == "lane" else "the device has not answered for 1 s"
    async with (
        running_server(small_model, EXPERTS, device_timeout=1.0) as server,
        way_to(str(server.address), way) as (transport, _),
    ):
        with pytest.raises(Unavailable, match=told):
            await transport.execute(call_for(server, BATCH, timeout=5))
        assert server.engine.closed_because == "the device has not answered for 1 s; use another replica"
        await until(lambda: server.engine.closed_because is None)


@pytest.mark.parametrize(("text", "least"), [("slow_loading=1:0.4", 0.8), ("slow_loading=0:5", 0.0)])
async def test_slow_loading_delays_every_layer(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, text: str, least: float
) -> None:
    monkeypatch.setenv(VARIABLE, text)
    now: Callable[[], float] = asyncio.get_running_loop().time
    started = now()
    async with running_server(small_model, range(16)):
        assert least <= now() - started < least + 4
