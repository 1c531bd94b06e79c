"""How this process gets memory for large messages and tensors."""

from __future__ import annotations

import ctypes
import logging
import os

log = logging.getLogger(__name__)
# malloc.h of glibc.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST_HEAP_BLOCK = 32 << 20
"""The most that glibc takes from its heaps; larger blocks always come from the kernel."""
KEPT_BYTES = (1 << 31) - 1
GROWTH_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Let malloc keep what is freed for the next message, instead of giving it back to the kernel each time.

    By default glibc returns blocks as large as messages at once, and the kernel hands them out again page by page,
    cleared: half of what a message of megabytes costs. The price is a process that stays as large as it ever was.
    torch's tensors, where they are too large to be kept, come in pages of 2 MiB where the kernel has such. Call it
    before torch allocates anything. False where the C library has no such settings.
    """
    # Read by torch's allocator when it is first used.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((M_MMAP_THRESHOLD, LARGEST_HEAP_BLOCK), (M_TRIM_THRESHOLD, KEPT_BYTES), (M_TOP_PAD, GROWTH_BYTES))
    kept = mallopt is not None and all(mallopt(name, value) == 1 for name, value in settings)
    if not kept:
        log.info("the C library has no mallopt for freed memory; large messages will be slower")
    return kept
