"""A server in a network namespace of its own, as containers on a bridge have, shares memory over a volume's socket."""

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from expertd.client.coordinator import Coordinator
from tests.support.coordinators import call

START_SECONDS = 300


@contextlib.asynccontextmanager
async def apart(model: Path, folder: Path) -> AsyncIterator[str]:
    """The address of a server that no TCP connection from here reaches."""
    unshare = shutil.which("unshare")
    if unshare is None or os.geteuid() != 0:
        pytest.skip("needs unshare and root, for a network namespace")
    path, ready = folder / "server-0.sock", folder / "ready.json"
    options = ("--listen", "0.0.0.0:0", "--insecure", "--unix-socket", str(path), "--ready-file", str(ready))
    command = (str(Path(sys.executable).parent / "expertd"), "serve", "--model", str(model), "--experts", "all")
    server = await asyncio.create_subprocess_exec(
        unshare, "--net", *command, "--backend", "torch", "--threads", "1", *options
    )
    try:
        async with asyncio.timeout(START_SECONDS):
            while not ready.exists():
                assert server.returncode is None, "the server ended"
                await asyncio.sleep(0.1)
        yield f"unix:{path}"
    finally:
        # As a container that does not stop in time: what it leaves must not keep the next one from starting.
        server.kill()
        await server.wait()
        ready.unlink(missing_ok=True)


async def test_a_socket_in_a_common_folder_carries_memory_between_network_namespaces(
    small_model: Path, tmp_path: Path
) -> None:
    for _ in range(2):
        async with apart(small_model, tmp_path) as address, Coordinator([address]) as moe:
            assert (await call(moe, 3)).isfinite().all()
            assert moe.sharing_memory == {address}
