"""A process with a running engine, a pool and a lane that forks or ends: `python -m tests.native.endings KIND`.

The requests that it makes of itself come on stdin; without torch, whose own end takes long.
"""

import gc
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable

from expertd._native import (
    CallbackExecutor,
    ClientLane,
    Engine,
    Failpoints,
    Inbox,
    Mapping,
    OwnedLayer,
    Placement,
    Tally,
)

SIZE = 1 << 20
"""Of the lane's memory, in bytes."""


class Running:
    """An engine with a thread, and one that computes for it."""

    def __init__(self, request: bytes) -> None:
        """`request` chooses expert 0 for all its tokens."""
        placement = Placement(
            model_fingerprint="model",
            epoch=1,
            layers=[OwnedLayer(layer, (0, 1), experts_text="0-1", key=layer) for layer in (1, 2)],
            layers_text="1-2",
            num_routed_experts=4,
            hidden_size=128,
            max_top_k=2,
            max_tokens=1000,
        )
        self.request = request
        self.inbox = Inbox()
        self.tally = Tally((1, 2), 4, (1.0,), (1.0,))
        self.executor = CallbackExecutor(2)
        self.engine = Engine(
            placement, max_batch_tokens=600, max_queued_tokens=20_000, max_queued_bytes=1 << 30, tally=self.tally
        )
        self.engine.use(self.executor)
        self.engine.open()
        self.lane = ClientLane(SIZE, 64, spin_us=0)
        ours, theirs = socket.socketpair()
        with theirs:
            self.engine.add_lane(Mapping(self.lane.descriptor, SIZE), theirs.fileno(), "caller")
        self.lane.connect(ours.detach())

    def start(self) -> None:
        self.engine.start()
        threading.Thread(target=compute, args=(self.executor,), daemon=True).start()

    def submit(self) -> None:
        assert self.inbox.submit(self.engine, self.request, "caller", None, None, "").refusal is None

    def serve(self, number: int) -> None:
        """One request by the inbox and a refused one by the lane, both answered."""
        self.submit()
        assert select.select([self.inbox.fileno()], [], [], 5)[0]
        (answered,) = self.inbox.drain()
        assert answered.refusal is None
        slot = self.lane.data + 64 * 64 * number
        assert self.lane.post(slot, b"", 2000)
        assert self.lane.wait(slot, 5)
        assert self.lane.reply(slot)


def compute(executor: CallbackExecutor) -> None:
    while (batch := executor.fetch()) is not None:
        batch.finish([batch.tokens, 0], 0, 0, 0)


def raises(call: Callable[[], object]) -> bool:
    try:
        call()
    except RuntimeError:
        return True
    return False


def be_a_child(rig: Running) -> None:
    calls: tuple[Callable[[], object], ...] = (
        rig.submit,
        rig.inbox.drain,
        rig.engine.stop,
        lambda: rig.engine.closed_because,
        lambda: rig.engine.add_lane(Mapping(rig.lane.descriptor, SIZE), 0, "caller"),
        rig.executor.fetch,
        rig.tally.answers,
        lambda: rig.lane.wait(0, 0),
    )
    assert all(map(raises, calls))


def fork(request: bytes) -> object:
    rig = Running(request)
    rig.start()
    rig.serve(1)
    child = os.fork()
    if child == 0:
        be_a_child(rig)
        started = time.monotonic()
        del rig
        gc.collect()
        assert time.monotonic() - started < 0.9, "it waited for threads that it does not have"
        # As a child of Python's usually does not: with all that comes at the end of an interpreter.
        sys.exit(7)
    deadline = time.monotonic() + 3
    while (status := os.waitpid(child, os.WNOHANG))[0] == 0:
        assert time.monotonic() < deadline, "the child hangs"
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(status[1]) == 7
    rig.serve(2)
    assert rig.engine.stop()
    return None


def stuck_executor(request: bytes) -> Running:
    """Whoever computes does not come back."""
    rig = Running(request)
    rig.engine.start()
    rig.submit()
    threading.Thread(target=hold, args=(rig.executor,), daemon=True).start()
    while rig.engine.queued_tokens:
        time.sleep(0.001)
    return rig


def hold(executor: CallbackExecutor) -> None:
    """Fetch a batch, and then wait for one more, for ever."""
    _ = [executor.fetch(), executor.fetch()]


def stuck_engine(request: bytes) -> Running:
    """It hangs, as in a driver."""
    rig, failpoints = Running(request), Failpoints("0")
    failpoints.add("stuck_device", 1, 1e9)
    rig.engine.use_failpoints(failpoints)
    rig.start()
    rig.submit()
    assert select.select([failpoints.fileno()], [], [], 5)[0]
    return rig


def busy(request: bytes) -> Running:
    """Threads of the pool wait for Python's lock, to write answers."""
    rig = Running(request)
    rig.start()
    for _ in range(50):
        rig.submit()
    return rig


class Late:
    """A thread that asks for Python's lock when the interpreter ends, which is when this goes."""

    def __init__(self, request: bytes) -> None:
        del request
        executor = CallbackExecutor(1)
        threading.Thread(target=executor.fetch, daemon=True).start()
        # Modules may be gone by then.
        self._interrupt, self._sleep = executor.interrupt, time.sleep

    def __del__(self) -> None:
        self._interrupt()
        self._sleep(0.2)


if __name__ == "__main__":
    # Until the end of the interpreter.
    kinds = {kind.__name__: kind for kind in (fork, stuck_executor, stuck_engine, busy, Late)}
    kept = kinds[sys.argv[1]](sys.stdin.buffer.read())
    print(time.monotonic(), flush=True)
