"""On how many threads torch computes what one thread asks for."""

from __future__ import annotations

import threading

import torch


def compute_alone(others: int) -> None:
    """Let torch compute what the calling thread asks for on that thread alone.

    New threads go on starting with `others`.
    """
    torch.get_num_threads()  # the first call in a thread sets its number, over what was set before
    torch.set_num_threads(1)
    # This has also set the number for threads that did not use torch yet. One of those can put it back without
    # changing it here.
    restoring = threading.Thread(target=torch.set_num_threads, args=(others,))
    restoring.start()
    restoring.join()
