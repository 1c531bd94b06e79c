"""Both ends of a lane on one mapping, as Python sees them."""

from __future__ import annotations

import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType

import pytest

SIZE, ENTRIES, ROOM = 1 << 20, 64, 1024
ECHO = struct.Struct("<QIIII")
SLOT_BYTES = 64 + 64 + ROOM


class Pair:
    """A caller's end, and a server that turns when it is told to."""

    def __init__(
        self, native: ModuleType, size: int = SIZE, entries: int = ENTRIES, change: tuple[str, int, int] | None = None
    ) -> None:
        """`change` is a format, an offset and a value to write before the handover."""
        self.lane = native.ClientLane(size, entries)
        self.memory = memoryview(self.lane.memory)
        if change is not None:
            struct.pack_into(change[0], self.memory, change[1], change[2])
        self.server = native.EchoServer()
        here, there = socket.socketpair()
        self.lane.connect(here.detach())
        self.refusal = self.server.add(self.lane.memory, there.fileno())
        if self.refusal:
            there.close()
        else:
            there.detach()

    def slot(self, index: int) -> int:
        return int(self.lane.data) + index * 2048

    def post(self, index: int, *, held: bool = False, looped: bool = False, room: int = ROOM) -> bool:
        slot = self.slot(index)
        at = slot + SLOT_BYTES
        self.memory[at : at + 8] = bytes([index % 256]) * 8
        return bool(self.lane.post(slot, ECHO.pack(at, 8, 16, held, 0), room, looped))

    def reply(self, index: int) -> bytes | None:
        reply: bytes | None = self.lane.reply(self.slot(index))
        return reply

    def check(self, index: int) -> None:
        reply = self.reply(index)
        assert reply is not None
        assert ECHO.unpack(reply)[4] == 8 * (index % 256)
        at = self.slot(index) + SLOT_BYTES + 8
        assert bytes(self.memory[at : at + 16]) == b"d" * 16

    def word(self, at: int) -> int:
        return int(struct.unpack_from("<I", self.memory, at)[0])


@pytest.fixture
def pair(native: ModuleType) -> Iterator[Pair]:
    pair = Pair(native)
    yield pair
    pair.lane.close()


def test_call_is_answered_in_its_slot(pair: Pair) -> None:
    assert pair.post(3)
    assert pair.lane.wait(pair.slot(3), 0) is None
    pair.server.turn()
    assert pair.lane.wait(pair.slot(3)) is True
    pair.check(3)
    assert pair.lane.in_flight == 0
    assert pair.reply(3) is None


def test_slot_without_a_call_is_not_looked_at(native: ModuleType, pair: Pair) -> None:
    far = 1 << 40
    with pytest.raises(ValueError, match="no call is in slot"):
        pair.lane.wait(far)
    pair.lane.cancel(far)
    assert pair.lane.reply(far) is None
    with pytest.raises(ConnectionError):
        native.ClientLane(SIZE, ENTRIES).post(8192, b"", ROOM)


def test_ring_wraps(pair: Pair) -> None:
    for index in range(300):
        assert pair.post(index % 7)
        pair.server.turn()
        pair.check(index % 7)
    assert pair.word(64) == pair.word(128) == 300


def test_thousand_tiny_requests_at_once(native: ModuleType) -> None:
    pair = Pair(native, size=4 << 20, entries=1024)
    assert all(pair.post(index) for index in range(1000))
    while pair.server.served < 1000:
        pair.server.turn()
    for index in range(1000):
        pair.check(index)


def test_full_ring_refuses_and_recovers(pair: Pair) -> None:
    assert all(pair.post(index) for index in range(ENTRIES))
    assert not pair.post(ENTRIES)
    pair.server.turn()
    assert not pair.post(ENTRIES)  # Answers that nobody has fetched are in flight, too.
    pair.check(0)
    assert pair.post(ENTRIES)


def test_held_calls_fill_the_lane_and_let_the_server_sleep(pair: Pair) -> None:
    assert all(pair.post(index, held=True) for index in range(ENTRIES))
    pair.server.turn()
    begin = time.monotonic()
    pair.server.turn(50)
    pair.server.turn(50)
    assert time.monotonic() - begin >= 0.045
    assert pair.server.reasons == []


def test_cancelled_call_is_reaped_when_done(pair: Pair) -> None:
    assert pair.post(1, held=True)
    pair.server.turn()
    pair.lane.cancel(pair.slot(1))
    assert pair.lane.reap() == []
    with pytest.raises(ValueError, match="no call can be in slot"):
        pair.post(1)
    pair.server.turn()
    assert pair.lane.reap() == [pair.slot(1)]
    assert pair.post(1)


def test_loop_is_rung_once_for_what_it_waits_for(pair: Pair) -> None:
    loop_end = socket.socket(fileno=os.dup(pair.lane.socket))
    assert pair.post(1, looped=True)
    assert pair.post(2, looped=True)
    assert pair.lane.poll() == []
    pair.server.turn()
    assert loop_end.recv(10, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"\0"
    assert sorted(pair.lane.poll()) == [pair.slot(1), pair.slot(2)]
    pair.check(1)
    pair.check(2)
    assert pair.lane.poll() == []
    loop_end.close()


def test_loop_is_not_rung_for_answers_to_threads(pair: Pair) -> None:
    loop_end = socket.socket(fileno=os.dup(pair.lane.socket))
    assert pair.lane.poll() == []
    assert pair.post(1)
    pair.server.turn()
    pair.check(1)
    with pytest.raises(BlockingIOError):
        loop_end.recv(10, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    # But for those that nobody waits for any more, whose slots it has to reap.
    assert pair.post(2, held=True)
    pair.server.turn()
    assert pair.lane.cancel(pair.slot(2))
    pair.server.turn()
    assert loop_end.recv(10, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"\0"
    assert pair.lane.poll() == []
    assert pair.lane.reap() == [pair.slot(2)]
    loop_end.close()


def test_call_that_is_done_when_it_is_given_up_is_free(pair: Pair) -> None:
    assert pair.post(1)
    pair.server.turn()
    assert not pair.lane.cancel(pair.slot(1))
    assert pair.lane.reap() == []
    assert pair.post(1)


def test_caller_that_reads_no_answers_gets_one_bell(pair: Pair) -> None:
    assert pair.lane.poll() == []
    for index in range(ENTRIES):
        assert pair.post(index, looped=True)
    pair.server.turn()
    assert pair.server.served == ENTRIES
    loop_end = socket.socket(fileno=os.dup(pair.lane.socket))
    assert loop_end.recv(1000, socket.MSG_PEEK | socket.MSG_DONTWAIT) == b"\0"
    loop_end.close()


def test_thread_sleeps_until_the_answer(pair: Pair) -> None:
    assert pair.post(1)
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(pair.lane.wait(pair.slot(1), 10)))
    thread.start()
    while pair.word(pair.slot(1)) != 3:
        time.sleep(0.001)
    pair.server.turn()
    thread.join()
    assert results == [True]
    pair.check(1)


def test_end_of_the_server_releases_threads_and_keeps_what_is_done(pair: Pair) -> None:
    assert pair.post(1)
    assert pair.post(2, held=True)
    pair.server.turn()
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(pair.lane.wait(pair.slot(2), 10)))
    thread.start()
    while pair.word(pair.slot(2)) != 3:
        time.sleep(0.001)
    pair.server.stop()
    while not pair.lane.ended:
        pair.lane.poll()
    thread.join()
    assert results == [False]
    assert pair.lane.wait(pair.slot(1)) is True
    pair.check(1)
    assert pair.lane.reason == b"stopped"
    with pytest.raises(ConnectionError):
        pair.post(3)


def test_signals_reach_a_thread_that_waits(pair: Pair) -> None:
    class Interrupted(Exception): ...

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise Interrupted

    assert pair.post(1)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        with pytest.raises(Interrupted):
            pair.lane.wait(pair.slot(1), 10)
    finally:
        signal.signal(signal.SIGALRM, before)


def test_forked_child_can_do_nothing(pair: Pair) -> None:
    assert pair.post(1)
    child = os.fork()
    if child == 0:
        try:
            pair.lane.wait(pair.slot(1), 0)
        except RuntimeError:
            os._exit(7)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    pair.server.turn()
    pair.check(1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("<Q", 0, 1), "no lane of version 3"),
        (("<I", 8, 2), "no lane of version 3"),
        (("<I", 12, 32), "power of two from 64 to 4096"),
        (("<I", 12, 65), "power of two from 64 to 4096"),
        (("<I", 12, 8192), "power of two from 64 to 4096"),
        (("<Q", 16, 8192), "the ring is at 8192"),
        (("<Q", 24, 4096 + 64), "from 5120 on"),
        (("<Q", 24, 8192 + 8), "a multiple of 64"),
        (("<Q", 24, SIZE), "the data at 1048576"),
        (("<Q", 24, 2**64 - 64), "the data at 18446744073709551552"),
    ],
)
def test_wrong_geometry_is_refused(native: ModuleType, change: tuple[str, int, int], reason: str) -> None:
    assert reason in Pair(native, change=change).refusal


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("<I", 64, 66), "66 entries ahead"),
        (("<Q", 4096, 64), "an entry's slot is 64"),
        (("<Q", 4096, SIZE), f"an entry's slot is {SIZE}"),
        (("<Q", 4096, SIZE - 32), "must be a multiple of 64"),
        (("<Q", 4096, 2**64 - 64), "an entry's slot is 18446744073709551552"),
        (("<I", 4104, 3), "an entry has the kind 3"),
        (("<I", 5120 + 4, 4097), "a request has 4097 bytes"),
        (("<I", 5120 + 8, 1023), "1024 are needed"),
        (("<I", 5120 + 8, 2**32 - 1), "room for replies of 4294967295 bytes"),
    ],
)
def test_wrong_words_end_the_lane_with_a_reason(pair: Pair, change: tuple[str, int, int], reason: str) -> None:
    assert pair.post(0)
    struct.pack_into(change[0], pair.memory, change[1], change[2])
    pair.server.turn()
    assert reason in pair.server.reasons[0]
    while not pair.lane.ended:
        pair.lane.poll()
    assert reason.encode() in pair.lane.reason


def test_lost_memory_reads_as_zeros_and_ends_the_lane(native: ModuleType) -> None:
    descriptor = os.memfd_create("expertd")
    os.ftruncate(descriptor, 1 << 16)
    mapping = native.Mapping(descriptor, 1 << 16)
    memory = memoryview(mapping)
    memory[4096] = 7
    os.ftruncate(descriptor, 0)
    assert not mapping.broken
    assert memory[4096] == 0
    assert mapping.broken
    os.close(descriptor)


def test_mapping_of_what_cannot_be_written_is_refused(native: ModuleType) -> None:
    with Path(os.devnull).open("rb") as file, pytest.raises(PermissionError):
        native.Mapping(file.fileno(), 4096)


@pytest.mark.parametrize(("size", "entries"), [(4096, 64), (SIZE, 63), (SIZE, 32), (SIZE, 8192)])
def test_lane_that_cannot_be_is_not_made(native: ModuleType, size: int, entries: int) -> None:
    with pytest.raises(ValueError, match="a lane of"):
        native.ClientLane(size, entries)
