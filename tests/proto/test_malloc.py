"""Freed memory that stays with the process."""

import subprocess
import sys

PROGRAM = """
import resource, sys
from expertd.proto.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    # As many at a time as a large batch has: glibc learns to keep one of them by itself.
    [bytes(2 << 20) for _ in range(20)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True, text=True)
    return int(done.stdout)


def test_blocks_as_large_as_messages_are_used_again() -> None:
    kept, given_back = page_faults("kept"), page_faults("given back")
    # Once each page of 4 KiB of 40 MiB.
    assert kept < 20_000, kept
    assert given_back > 3 * kept, (kept, given_back)
