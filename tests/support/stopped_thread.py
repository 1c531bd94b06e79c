"""Stops one thread of a child process, as if it hung; the others run on."""

import contextlib
import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path

CONT, DETACH, SEIZE, INTERRUPT = 7, 17, 0x4206, 0x4207
EPOLL_WAIT = (232, 281)
"""Numbers of its system calls on x86-64."""
LIBC = ctypes.CDLL(None, use_errno=True)


def thread_of(process: int, name: str) -> int:
    tasks = Path(f"/proc/{process}/task").iterdir()
    (number,) = (int(task.name) for task in tasks if (task / "comm").read_text().strip() == name)
    return number


@contextlib.contextmanager
def stopped(number: int) -> Iterator[None]:
    """A thread of a process that nobody else waits for, stopped where it waits for events: there it holds no lock."""
    _ptrace(SEIZE, number)
    try:
        for _ in range(100):
            _ptrace(INTERRUPT, number)
            os.waitpid(number, 0x40000000)  # __WALL: threads too.
            if Path(f"/proc/{number}/syscall").read_text().split()[0] in map(str, EPOLL_WAIT):
                break
            _ptrace(CONT, number)
            time.sleep(0.01)
        else:
            raise AssertionError(f"thread {number} never waits for events")
        yield
    finally:
        _ptrace(DETACH, number)


def _ptrace(request: int, thread: int) -> None:
    if LIBC.ptrace(ctypes.c_long(request), ctypes.c_long(thread), None, None) != 0:
        raise OSError(ctypes.get_errno(), f"ptrace {request:#x}")
