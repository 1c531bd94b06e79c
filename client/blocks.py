"""Work on the rows of large batches, cut into blocks for several cores."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

BLOCK_TOKENS = 128
"""A block's FP32 values of 4 MB at hidden size 7168 stay in a core's share of the cache."""
MOST_WORKERS = 8


def start_blocks(num_tokens: int, work: Callable[[slice], None]) -> list[asyncio.Future[None]]:
    """Call `work` with slices of `BLOCK_TOKENS` tokens on worker threads; each has a future, in order.

    A single block is worked on at once, in the calling thread.
    """
    loop = asyncio.get_running_loop()
    blocks = [slice(first, min(first + BLOCK_TOKENS, num_tokens)) for first in range(0, num_tokens, BLOCK_TOKENS)]
    if len(blocks) > 1:
        return [loop.run_in_executor(_workers(), work, block) for block in blocks]
    work(blocks[0])
    done: asyncio.Future[None] = loop.create_future()
    done.set_result(None)
    return [done]


@cache
def _workers() -> ThreadPoolExecutor:
    cores = len(os.sched_getaffinity(0))
    return ThreadPoolExecutor(
        min(MOST_WORKERS, cores), "expertd-block", initializer=compute_alone, initargs=(torch.get_num_threads(),)
    )


def compute_alone(others: int) -> None:
    """Let torch compute what the calling thread asks for on that thread alone: the blocks fill the cores already.

    New threads go on starting with `others`.
    """
    torch.get_num_threads()  # the first call in a thread sets its number, over what was set before
    torch.set_num_threads(1)
    # This has also set the number for threads that did not use torch yet. One of those can put it back without
    # changing it here.
    restoring = threading.Thread(target=torch.set_num_threads, args=(others,))
    restoring.start()
    restoring.join()
