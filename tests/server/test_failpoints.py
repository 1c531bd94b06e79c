"""Faults on purpose: read from the environment alone, repeatable, and each what it says."""

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.proto.base.errors import DeadlineExceeded, ExpertdError, ServerFault, StalePlacement, Unavailable
from expertd.server.failpoints import SECONDS, VARIABLE, FaultyExecutor, parse_failpoints
from expertd.server.options.config import InvalidOption
from expertd.server.rpc.executor import ShardExecutor
from tests.support.serving import call_for, random_batch, running_server


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
        assert type(server.handlers.execution.executor) is ShardExecutor
        assert type(server.backend).__name__ == "TorchBackend"


@pytest.mark.parametrize(
    ("fault", "kind", "complaint"),
    [
        ("drop=1", DeadlineExceeded, r"no answer within 0\.5 s"),
        ("delay=1:1", DeadlineExceeded, r"no answer within 0\.5 s"),
        ("reset=1", Unavailable, "reset|closed|EOF|failed to connect|ended"),
        ("corrupt_reply=1", ServerFault, "altered on its way: its checksum does not match its partials"),
        ("stale_epoch=1", StalePlacement, r"placement_epoch is \d+; the current one is \d+"),
        ("device_error=1", ServerFault, "the device failed: RuntimeError: failpoint device_error"),
    ],
)
async def test_faults_reach_the_caller_as_errors(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, fault: str, kind: type[ExpertdError], complaint: str
) -> None:
    monkeypatch.setenv(VARIABLE, fault)
    async with running_server(small_model, range(16), drain_seconds=0.2) as server:
        # An error that ends the server is for the tests of the watchdog.
        monkeypatch.setattr(server.watchdog, "suspect", lambda error: None)
        assert isinstance(server.handlers.execution.executor, FaultyExecutor)
        transport = GrpcTransport(str(server.address))
        try:
            call = call_for(server, random_batch(2, 256, 16, 4), timeout=0.5)
            with pytest.raises(kind, match=complaint):
                await transport.execute(call)
        finally:
            await transport.close()


async def test_a_wrong_receipt_passes_the_checksum_and_claims_pairs_that_were_not_sent(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "wrong_receipt=1")
    async with running_server(small_model, range(16)) as server:
        transport = GrpcTransport(str(server.address))
        result = await transport.execute(call_for(server, random_batch(2, 256, 16, 4)))
        await transport.close()
    assert result.receipt[0] == 3


@pytest.mark.parametrize(("text", "least"), [("slow_loading=1:0.4", 0.8), ("slow_loading=0:5", 0.0)])
async def test_slow_loading_delays_every_layer(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, text: str, least: float
) -> None:
    monkeypatch.setenv(VARIABLE, text)
    now: Callable[[], float] = asyncio.get_running_loop().time
    started = now()
    async with running_server(small_model, range(16)):
        assert least <= now() - started < least + 4
