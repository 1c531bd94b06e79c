"""Segments of gigabytes: mapped, refused and given back without anybody waiting for it."""

import asyncio
import mmap
import os
import socket
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from expertd.proto import expert_shard_pb2 as pb
from expertd.server.local.door import LocalDoor
from tests.support.local_caller import Handover, connect, handing_over, over_grpc, registration_of, sealed_memory
from tests.support.serving import door, running_server, until

SPARSE = 3 << 30
MOST_WAIT = 0.4
"""Tens of milliseconds, and what other work of the machine adds; it takes more than a second at once."""


def available() -> int:
    meminfo = Path("/proc/meminfo").read_text()
    return next(int(line.split()[1]) << 10 for line in meminfo.splitlines() if line.startswith("MemAvailable"))


pytestmark = pytest.mark.skipif(available() < 2 * SPARSE, reason=f"needs {2 * SPARSE >> 30} GiB of memory")


class Waits:
    """The longest that the event loop, and a thread that maps memory of its own, had to wait."""

    def __init__(self) -> None:
        self.loop = self.thread = 0.0

    @asynccontextmanager
    async def probing(self) -> AsyncIterator[None]:
        stopped = threading.Event()
        thread = threading.Thread(target=self._map, args=(stopped,))
        thread.start()
        task = asyncio.create_task(self._sleep())
        yield
        # For who has been kept waiting until now.
        await asyncio.sleep(0.01)
        task.cancel()
        stopped.set()
        thread.join()

    async def _sleep(self) -> None:
        while True:
            due = time.perf_counter() + 0.001
            await asyncio.sleep(0.001)
            self.loop = max(self.loop, time.perf_counter() - due)

    def _map(self, stopped: threading.Event) -> None:
        while not stopped.wait(0.001):
            started = time.perf_counter()
            mmap.mmap(-1, mmap.PAGESIZE).close()
            self.thread = max(self.thread, time.perf_counter() - started)


async def test_a_sparse_segment_of_gigabytes_freezes_nobody(small_model: Path) -> None:
    waits = Waits()
    async with running_server(small_model, range(16), shared_memory_bytes=2 * SPARSE) as server:
        local = door(server, LocalDoor)
        async with waits.probing():
            async with handing_over(server, [sealed_memory(SPARSE)]) as caller:
                assert await caller.answer() == pb.ExecuteResponse()
                assert local.mapped_bytes == SPARSE
                await over_grpc(server)
            await until(lambda: local.mapped_bytes == 0)
    print(f"\n{SPARSE >> 30} GiB: loop {waits.loop * 1e3:.1f} ms, mapping thread {waits.thread * 1e3:.1f} ms")
    assert waits.loop < MOST_WAIT
    assert waits.thread < MOST_WAIT


async def test_a_segment_that_is_refused_is_freed_beside_the_event_loop(small_model: Path) -> None:
    waits = Waits()
    descriptor = sealed_memory(SPARSE)
    for at in range(0, SPARSE, 64 << 20):
        os.pwrite(descriptor, bytes(64 << 20), at)
    async with running_server(small_model, range(16), shared_memory_bytes=1 << 20) as server:
        registration = await registration_of(server)
        connection = await connect(registration)
        async with waits.probing():
            socket.send_fds(connection, [registration.ticket], [descriptor])
            # From now on the server alone has it.
            os.close(descriptor)
            reader, writer = await asyncio.open_unix_connection(sock=connection)
            answer = await Handover(reader, writer).answer()
            writer.close()
    assert "are left of --shared-memory-bytes" in answer.error.message
    print(f"\nrefused {SPARSE >> 30} GiB: loop {waits.loop * 1e3:.1f} ms")
    assert waits.loop < MOST_WAIT
