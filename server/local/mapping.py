"""A caller's segment, mapped into the server: what it must be so that nothing its owner does can fault here."""

from __future__ import annotations

import fcntl
import mmap
import os

from expertd._native import Mapping
from expertd.proto.base.errors import InvalidBatch


def check_segment(descriptor: int) -> int:
    """The size in bytes of a caller's memfd. Raises `InvalidBatch` for what could fault once it is mapped."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError:
        raise InvalidBatch("the segment is no memfd; create it with memfd_create and MFD_ALLOW_SEALING") from None
    if not seals & fcntl.F_SEAL_SHRINK:
        raise InvalidBatch("the segment can shrink; add F_SEAL_SHRINK to its seals")
    if os.fstatvfs(descriptor).f_bsize != mmap.PAGESIZE:
        # Huge pages can be taken out from under a mapping in spite of the seal.
        raise InvalidBatch(f"the segment has huge pages; create it with pages of {mmap.PAGESIZE} bytes")
    size = os.fstat(descriptor).st_size
    if size == 0:
        raise InvalidBatch("the segment has 0 bytes; set its length with ftruncate")
    return size


def map_segment(descriptor: int, size: int) -> Mapping:
    """Map a checked memfd. Raises `InvalidBatch` for one that cannot be written."""
    try:
        return Mapping(descriptor, size)
    except OSError as error:
        raise InvalidBatch(f"the segment cannot be mapped to read and write: {error.strerror}") from None
