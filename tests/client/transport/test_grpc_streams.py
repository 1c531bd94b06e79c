"""A stream whose answers cannot be read: nobody waits in vain, and the next call has another one."""

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from expertd.client.transport import grpc_streams
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.interface import Silent
from expertd.proto.base.errors import Unavailable
from expertd.proto.codec import encode_call, parse_response
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


async def test_a_request_is_written_before_its_caller_waits_and_others_after_it(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_server(small_model, range(16)) as server:
        transport = GrpcTransport(str(server.address))
        call = call_for(server, random_batch(2, 256, 16, 4))
        await transport.execute(call)
        stream = transport._channels[0]._stream
        assert stream is not None
        written: list[bytes] = []
        write = stream._call.write

        async def note(message: bytes) -> None:
            written.append(message)
            await write(message)

        monkeypatch.setattr(stream._call, "write", note)
        messages = [encode_call(replace(call, request_id=number)) for number in (11, 12, 13)]
        answers = [transport.exchange(number, message) for number, message in zip((11, 12, 13), messages, strict=True)]
        assert written == messages[:1]
        found = await asyncio.gather(*answers)
        assert written == messages
        assert [parse_response(one).request_id for one in found] == [11, 12, 13]
        # Nothing is on its way any more: the next one is written at once again.
        await asyncio.sleep(0.05)
        last = transport.exchange(14, encode_call(replace(call, request_id=14)))
        assert len(written) == 4
        await last
        await transport.close()


async def test_a_server_that_takes_long_to_shake_hands_is_reached(small_model: Path) -> None:
    async with running_server(small_model, range(16)) as server, Wire(str(server.address)).carrying() as wire:
        wire.delay = 0.8
        transport = GrpcTransport(wire.address)
        assert (await transport.get_shard(timeout=8.0)).experts[1] == tuple(range(16))
        await transport.close()


async def test_a_server_that_falls_silent_after_an_answer_is_noticed_as_soon_as_one_that_gave_none() -> None:
    """The answer comes while a question for a sign of life waits, which is then no proof of silence."""

    async def never(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        await asyncio.Event().wait()
        raise AssertionError("unreachable")

    server = grpc.aio.server()
    check: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(never)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("grpc.health.v1.Health", {"Check": check})])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    transport = GrpcTransport(f"127.0.0.1:{port}")
    watching = asyncio.create_task(transport.until_not_serving())
    await asyncio.sleep(grpc_streams.LIFE_SECONDS)
    transport._hear()
    heard = time.monotonic()
    assert isinstance(await watching, Silent)
    assert time.monotonic() - heard < grpc_streams.LIFE_SECONDS + grpc_streams.SILENT_SECONDS + 0.3
    await transport.close()
    await server.stop(None)
