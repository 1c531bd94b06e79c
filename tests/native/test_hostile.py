"""What a hostile message costs the engine: little time, and no memory once it is refused."""

import time
from pathlib import Path

import pytest

from expertd.proto.codec.wire import BYTES, VARINT, tag, varint
from tests.support.native.hand_turned import HandTurned

LONG, NAME, REQUESTS = 30 << 20, 4 << 20, 24
TINY = tag(2000, VARINT) + b"\1"
FIELDS = {
    "one unknown field": tag(2000, BYTES) + varint(LONG) + bytes(LONG),
    "millions of unknown fields": TINY * (LONG // len(TINY)),
    "millions of fields known": (tag(1, VARINT) + b"\1") * (LONG // 2),
    "garbage": b"\xff" * LONG,
}
SIZES = {5: 1, 6: 1, 7: 2, 8: 3}
"""One token, top-k 1, BF16 and FP32."""


def named(name: bytes) -> bytes:
    """A request for a model of this name, right but for that."""
    sizes = b"".join(tag(number, VARINT) + varint(value) for number, value in SIZES.items())
    tensors = b"".join(
        tag(number, BYTES) + varint(length) + bytes(length) for number, length in ((9, 256), (11, 4), (12, 4))
    )
    return sizes + tensors + tag(2, BYTES) + varint(len(name)) + name


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.parametrize("kind", FIELDS)
def test_a_long_message_is_refused_in_no_time(kind: str) -> None:
    turned = HandTurned()
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        submitted = turned.submit(FIELDS[kind])
        seconds.append(time.perf_counter() - started)
        assert submitted.refusal is not None
    assert min(seconds) < 0.001


def test_names_are_quoted_in_part_and_kept_by_nobody() -> None:
    turned = HandTurned()
    turned.tally.tell_of(everything=True, traced=True)
    before = resident()
    for number in range(REQUESTS):
        refusal = turned.submit(named(bytes([65 + number]) * NAME)).refusal
        assert refusal is not None
        assert f"... of {NAME} bytes" in refusal.text
        assert len(refusal.text) < 300
        # The caller's span comes with the call's metadata, or in the message.
        turned.submit(b"", caller="b", traceparent="x" * NAME)
    told, _ = turned.tally.take_told()
    assert max(len(one.traceparent) for one in told) == 64
    assert resident() - before < REQUESTS * NAME // 8
