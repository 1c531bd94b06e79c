"""A stream whose answers cannot be read: nobody waits in vain, and the next call has another one."""

from pathlib import Path

import pytest

from expertd.client.transport import grpc_streams
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.proto.base.errors import Unavailable
from tests.support.serving import call_for, random_batch, running_server
from tests.support.wire import Wire


async def test_a_reader_that_fails_is_seen_and_fails_those_who_wait(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def misread(data: bytes) -> int:
        raise LookupError("a bug")

    async with running_server(small_model, range(16)) as server:
        transport = GrpcTransport(str(server.address))
        call = call_for(server, random_batch(2, 256, 16, 4))
        with monkeypatch.context() as patch:
            patch.setattr(grpc_streams, "response_id", misread)
            with pytest.raises(Unavailable, match="its answers are not read any more"):
                await transport.execute(call)
        assert (await transport.execute(call)).partials.isfinite().all()
        await transport.close()
    assert f"reading the answers of {server.address} failed" in caplog.text
    assert "LookupError: a bug" in caplog.text


async def test_a_server_that_takes_long_to_shake_hands_is_reached(small_model: Path) -> None:
    async with running_server(small_model, range(16)) as server, Wire(str(server.address)).carrying() as wire:
        wire.delay = 0.8
        transport = GrpcTransport(wire.address)
        assert (await transport.get_shard(timeout=8.0)).experts[1] == tuple(range(16))
        await transport.close()
