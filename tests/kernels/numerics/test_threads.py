"""On how many threads torch computes."""

import threading

import torch

from expertd.kernels.numerics.threads import compute_alone


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
