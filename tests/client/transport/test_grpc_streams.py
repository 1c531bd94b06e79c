"""A stream whose answers cannot be read: nobody waits in vain, and the next call has another one."""

from pathlib import Path

import pytest

from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.proto import codec
from expertd.proto.base.errors import Unavailable
from tests.support.serving import call_for, random_batch, running_server


async def test_a_reader_that_fails_is_seen_and_fails_those_who_wait(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def misread(data: bytes) -> codec.RawResponse:
        raise LookupError("a bug")

    async with running_server(small_model, range(16)) as server:
        transport = GrpcTransport(str(server.address))
        call = call_for(server, random_batch(2, 256, 16, 4))
        with monkeypatch.context() as patch:
            patch.setattr(codec, "parse_response", misread)
            with pytest.raises(Unavailable, match="its answers are not read any more"):
                await transport.execute(call)
        assert (await transport.execute(call)).partials.isfinite().all()
        await transport.close()
    assert f"reading the answers of {server.address} failed" in caplog.text
    assert "LookupError: a bug" in caplog.text
