"""Shared memory between real processes: what a server keeps of a client that was killed."""

import asyncio
import sys
import urllib.request
from pathlib import Path

import torch

from expertd.client.coordinator import Coordinator
from expertd.client.tools.cluster import LocalCluster

OPTIONS = ["--backend", "torch", "--threads", "1"]
CLIENT = """
import asyncio, sys
import torch
from expertd.client.coordinator import Coordinator

async def main():
    async with Coordinator([sys.argv[1]]) as moe:
        assert moe.sharing_memory
        ids, weights = torch.arange(4).expand(500, 4), torch.ones(500, 4)
        async def caller():
            while True:
                await moe(1, torch.randn(500, 256), topk_ids=ids, topk_weights=weights)
                print("answered", flush=True)
        await asyncio.gather(*(caller() for _ in range(4)))

asyncio.run(main())
"""


def shared_bytes(metrics_url: str) -> float:
    with urllib.request.urlopen(metrics_url) as answer:
        text = str(answer.read(), "utf-8")
    return float(text.split("\nexpertd_shared_memory_bytes ")[1].split("\n")[0])


def mappings(process: int) -> int:
    return Path(f"/proc/{process}/maps").read_text().count("/memfd:expertd")


def descriptors(process: int) -> int:
    return len(list(Path(f"/proc/{process}/fd").iterdir()))


async def settled_descriptors(process: int) -> int:
    """As soon as they stay the same: a coordinator asks for signs of life on a connection that it opens by and by."""
    before = -1
    while before != (now := descriptors(process)):
        before = now
        await asyncio.sleep(1)
    return now


async def test_a_killed_clients_memory_and_descriptors_are_freed_and_others_go_on(small_model: Path) -> None:
    hidden, ids, weights = torch.randn(9, 256), torch.arange(4).expand(9, 4), torch.ones(9, 4)
    async with LocalCluster(small_model, ["0-15"], OPTIONS) as cluster, Coordinator(cluster.addresses) as moe:
        server = cluster.servers[0]
        assert moe.sharing_memory == {server.address}
        right = await moe(1, hidden, topk_ids=ids, topk_weights=weights)
        before = mappings(server.process.pid), shared_bytes(server.metrics_url)
        assert before == (1, 16 << 20)
        open_before = await settled_descriptors(server.process.pid)
        client = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-c", CLIENT, server.address), stdout=asyncio.subprocess.PIPE
        )
        assert client.stdout is not None
        assert await client.stdout.readline() == b"answered\n"
        assert (mappings(server.process.pid), shared_bytes(server.metrics_url)) == (2, 32 << 20)
        client.kill()
        await client.wait()
        async with asyncio.timeout(20):
            while (mappings(server.process.pid), shared_bytes(server.metrics_url)) != before:
                await asyncio.sleep(0.05)
            while descriptors(server.process.pid) > open_before:
                await asyncio.sleep(0.05)
        assert torch.equal(await moe(1, hidden, topk_ids=ids, topk_weights=weights), right)
        assert moe.sharing_memory == {server.address}
    assert cluster.exit_codes == [0]
