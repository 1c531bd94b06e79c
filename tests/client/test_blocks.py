"""Blocks of rows on worker threads."""

import asyncio
import threading

import pytest
import torch

from expertd.client.blocks import BLOCK_TOKENS, compute_alone, start_blocks


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


def test_computing_alone_changes_no_other_thread() -> None:
    before = torch.get_num_threads()
    counts: dict[str, int] = {}

    def worker() -> None:
        compute_alone(before)
        counts["worker"] = torch.get_num_threads()

    def another() -> None:
        counts["another"] = torch.get_num_threads()

    for run in (worker, another):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert counts == {"worker": 1, "another": before}
    assert torch.get_num_threads() == before
