"""Freed memory that stays with the process."""

import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys, torch
from expertd.proto.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
{work}
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
# As many at a time as a large batch has: glibc learns to keep one of them by itself.
MESSAGES = "for _ in range(50): [bytes(2 << 20) for _ in range(20)]"
TENSORS = "for _ in range(10): torch.ones(128 << 20, dtype=torch.uint8)"
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def page_faults(work: str, how: str) -> int:
    program = [sys.executable, "-c", PROGRAM.replace("{work}", work), how]
    done = subprocess.run(program, check=True, capture_output=True, text=True)
    return int(done.stdout)


def test_blocks_as_large_as_messages_are_used_again() -> None:
    kept, given_back = page_faults(MESSAGES, "kept"), page_faults(MESSAGES, "given back")
    # Once each page of 4 KiB of 40 MiB.
    assert kept < 20_000, kept
    assert given_back > 2 * kept, (kept, given_back)


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="the kernel has no huge pages"
)
def test_large_tensors_come_in_large_pages() -> None:
    kept, given_back = page_faults(TENSORS, "kept"), page_faults(TENSORS, "given back")
    assert given_back > 10 * kept, (kept, given_back)
