"""What a fork, and the end of the interpreter, make of an engine at work."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.native.endings import Running
from tests.support.native.hand_turned import message

ROOT = Path(__file__).parents[2]
REQUEST = message(tokens=300)
"""So long that threads of the pool write its answer."""


def seconds_to_end(kind: str) -> float:
    """Of `tests.native.endings`, from its last line on."""
    command = [sys.executable, "-X", "faulthandler", "-m", "tests.native.endings", kind]
    done = subprocess.run(command, input=REQUEST, cwd=ROOT, capture_output=True, timeout=60)
    ended = time.monotonic()
    assert (done.returncode, done.stderr) == (0, b"")
    return ended - float(done.stdout)


@pytest.mark.skipif(
    "tsan" in os.environ.get("LD_PRELOAD", ""), reason="TSan's runtime does not survive fork with threads"
)
def test_a_forked_child_can_do_nothing_and_its_parent_goes_on() -> None:
    seconds_to_end("fork")


@pytest.mark.parametrize("kind", ["stuck_executor", "stuck_engine", "busy", "Late"])
def test_the_interpreter_ends_in_time_whatever_hangs(kind: str) -> None:
    assert seconds_to_end(kind) < 2


def test_no_file_is_left_to_other_programs() -> None:
    before = open_files()
    rig = Running(REQUEST)
    opened = open_files() - before
    assert len(opened) >= 6
    assert not any(map(os.get_inheritable, opened))
    rig.lane.close()


def open_files() -> set[int]:
    listed = [int(path.name) for path in Path("/proc/self/fd").iterdir()]
    # Without the listing's own.
    return {descriptor for descriptor in listed if Path(f"/proc/self/fd/{descriptor}").exists()}


MADE_AT_ONCE = """
import threading, time
from expertd import _native

end = time.monotonic() + 2

def lanes():
    while time.monotonic() < end:
        _native.ClientLane(1 << 16, 64)

def lists():
    while time.monotonic() < end:
        kept = [_native.FreeList(0, 64) for _ in range(200)]

for target in (lanes, lanes, lists, lists):
    threading.Thread(target=target).start()
"""


def test_objects_that_are_made_without_the_lock_are_noted_with_it() -> None:
    """Otherwise their notes are spoilt by those of other threads, and the process ends at some object's end."""
    assert subprocess.run([sys.executable, "-c", MADE_AT_ONCE], check=False).returncode == 0
