"""What a program with coordinators prints is expertd's and its own: gRPC's core keeps to itself."""

import asyncio
import os
import sys
from pathlib import Path

from expertd.client.tools.cluster import LocalCluster

CALL = """
import asyncio, sys, torch
from expertd import Coordinator

async def main():
    async with Coordinator(sys.argv[1:]) as moe:
        await moe(1, torch.ones(1, 256), topk_ids=torch.tensor([[3]]), topk_weights=torch.ones(1, 1))
"""
WAIT = """
print("connected", flush=True)
await asyncio.to_thread(sys.stdin.readline)
await asyncio.sleep(0.3)
"""
WITHIN, AFTERWARDS = (CALL + WAIT.replace("\n", "\n" + " " * depth) + "\nasyncio.run(main())" for depth in (8, 4))
"""A coordinator that is open when its server ends says so; of one that is closed gRPC still has the connection."""


async def printed(model: Path, program: str, environment: dict[str, str]) -> list[str]:
    """The lines of standard error of a program that outlives its server."""
    async with LocalCluster(model, ["0-15"], ["--backend", "torch", "--threads", "1"]) as cluster:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", program, *cluster.addresses),
            env={name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"} | environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"connected\n"
    _, stderr = await asyncio.wait_for(process.communicate(b"\n"), 60)
    return stderr.decode().splitlines()


async def test_a_server_that_goes_away_has_nothing_but_expertds_words_printed(small_model: Path) -> None:
    assert await printed(small_model, AFTERWARDS, {}) == []
    (line,) = await printed(small_model, WITHIN, {})
    assert " is out of use: " in line


async def test_who_wants_to_hear_grpc_hears_it(small_model: Path) -> None:
    lines = await printed(small_model, AFTERWARDS, {"GRPC_VERBOSITY": "INFO"})
    assert any("Log level INFO is not suitable for production" in line for line in lines)
