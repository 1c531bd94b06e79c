"""Memory that the GPU cannot pin: a caller's is refused, a front end's is used as it is."""

from pathlib import Path

import grpc
import pytest
import torch

from expertd.proto.base.errors import ServerFault
from expertd.server.local.door import LocalDoor
from expertd.server.local.front_ends import FrontEnds
from expertd.server.local.gpu import Gpu
from tests.support.local_caller import handing_over, sealed_memory
from tests.support.serving import door, execute_method, open_channel, random_batch, request_for, running_server


def refuse(memory: memoryview) -> None:
    raise ServerFault(f"the segment's {len(memory)} bytes cannot be pinned: CUDA error 2")


async def test_what_cannot_be_pinned_is_refused_from_callers_alone(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("expertd.server.local.gpu.pin", refuse)
    present = Gpu.__init__
    monkeypatch.setattr(Gpu, "__init__", lambda gpu, device, **_: present(gpu, device, present=True))
    monkeypatch.setattr("expertd.server.assembly.current_gpu", lambda: torch.device("cuda", 0))
    monkeypatch.setattr("expertd.server.assembly.gpu_uuid", lambda device: "GPU-none")
    async with running_server(small_model, range(16), shared_memory_bytes=1 << 20, front_ends=1) as server:
        async with handing_over(server, [sealed_memory()]) as caller:
            error = (await caller.answer()).error
        assert (error.code, door(server, LocalDoor).mapped_bytes) == (grpc.StatusCode.INTERNAL.value[0], 0)
        assert error.message == "the segment's 65536 bytes cannot be pinned: CUDA error 2"
        assert door(server, FrontEnds).listening == 1
        assert "bytes cannot be pinned: CUDA error 2: a front end's calls are slower" in caplog.text
        async with open_channel(server) as channel:
            assert (await execute_method(channel)(request_for(server, random_batch(4, 256, 16, 4)))).partials
