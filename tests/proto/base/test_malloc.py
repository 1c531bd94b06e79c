"""Freed memory that stays with the process."""

import os
import subprocess
import sys

FAULTS = """
import resource, sys
from expertd.proto.base.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
# As many at a time as a large batch has: glibc learns to keep one of them by itself.
for _ in range(50):
    [bytes(2 << 20) for _ in range(20)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
FLAGS = """
import sys, torch
from expertd.proto.base.malloc import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
tensor = torch.ones(128 << 20, dtype=torch.uint8)
middle = tensor.data_ptr() + (64 << 20)
within = False
for line in open("/proc/self/smaps"):
    first, *rest = line.split()
    if "-" in first:
        begin, end = (int(address, 16) for address in first.split("-"))
        within = begin <= middle < end
    elif within and first == "VmFlags:":
        print(*rest)
"""


def run(program: str, how: str) -> str:
    # As it is before anything of expertd has run.
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    return subprocess.check_output([sys.executable, "-c", program, how], text=True, env=environment)


def test_blocks_as_large_as_messages_are_used_again() -> None:
    kept, given_back = int(run(FAULTS, "kept")), int(run(FAULTS, "given back"))
    # Once each page of 4 KiB of 40 MiB.
    assert kept < 20_000, kept
    assert given_back > 2 * kept, (kept, given_back)


def test_large_tensors_ask_for_large_pages() -> None:
    # Whether the kernel has such pages left is another matter.
    assert "hg" in run(FLAGS, "kept").split()
    assert "hg" not in run(FLAGS, "given back").split()
