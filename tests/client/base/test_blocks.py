"""Blocks of rows on worker threads."""

import asyncio
import subprocess
import sys
import threading

import pytest
import torch

from expertd.client.base.blocks import BLOCK_TOKENS, COPY_BYTES, copy_bytes, start_blocks

FORKING = """
import asyncio, os
from expertd.client.base.blocks import BLOCK_TOKENS, start_blocks

async def work():
    await asyncio.wait_for(asyncio.gather(*start_blocks(2 * BLOCK_TOKENS, print)), 20)

asyncio.run(work())
if (child := os.fork()) == 0:
    asyncio.run(work())
    os._exit(0)
raise SystemExit(os.waitpid(child, 0)[1] != 0)
"""


@pytest.mark.parametrize("tokens", [1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 5 * BLOCK_TOKENS - 1])
async def test_blocks_cover_every_token_once(tokens: int) -> None:
    seen = torch.zeros(tokens, dtype=torch.int32)
    threads = set()

    def work(rows: slice) -> None:
        seen[rows] += 1
        threads.add(threading.current_thread() is threading.main_thread())

    await asyncio.gather(*start_blocks(tokens, work))
    assert (seen == 1).all()
    assert threads == {tokens <= BLOCK_TOKENS}, "one block needs no other thread"


async def test_an_error_in_a_block_reaches_the_caller() -> None:
    def work(rows: slice) -> None:
        if rows.start:
            raise ValueError("the second block")

    with pytest.raises(ValueError, match="the second block"):
        await asyncio.gather(*start_blocks(BLOCK_TOKENS + 1, work))


def test_a_child_has_threads_of_its_own() -> None:
    subprocess.run([sys.executable, "-c", FORKING], check=True, timeout=100)


@pytest.mark.parametrize("size", [0, 1, COPY_BYTES, COPY_BYTES + 1, 3 * COPY_BYTES + 5])
async def test_bytes_are_copied_whole(size: int) -> None:
    source = torch.randint(0, 256, (size,), dtype=torch.uint8)
    target = torch.zeros(size, dtype=torch.uint8)
    await copy_bytes(target, source)
    assert torch.equal(target, source)
