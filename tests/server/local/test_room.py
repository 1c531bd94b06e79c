"""What callers may share, all together and each."""

import pytest

from expertd.proto.base.errors import Overloaded
from expertd.server.local.room import MAX_CALLER_LANES, MAX_LANES, Room


def test_bytes_are_bounded_for_all_and_for_each() -> None:
    room = Room(1000)
    first = room.take("process 1", 400)
    with pytest.raises(
        Overloaded, match="101 bytes; 100 are left of the half of --shared-memory-bytes that process 1 may"
    ):
        room.take("process 1", 101)
    room.take("process 2", 500)
    with pytest.raises(Overloaded, match="the segment has 101 bytes; 100 are left of --shared-memory-bytes"):
        room.take("process 3", 101)
    assert room.taken_bytes == 900
    room.give_back(first)
    room.take("process 1", 500)
    assert room.taken_bytes == 1000


def test_lanes_are_bounded_for_all_and_for_each() -> None:
    room = Room(1 << 30)
    shares = [room.take("process 1", 1) for _ in range(MAX_CALLER_LANES)]
    with pytest.raises(Overloaded, match="process 1 has 16 lanes, as many as one may have"):
        room.take("process 1", 1)
    for number in range(MAX_CALLER_LANES, MAX_LANES):
        room.take(f"process {number}", 1)
    with pytest.raises(Overloaded, match="there are 256 lanes, as many as there may be"):
        room.take(f"process {MAX_LANES}", 1)
    room.give_back(shares[0])
    room.take(f"process {MAX_LANES}", 1)
