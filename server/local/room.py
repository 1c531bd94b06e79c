"""How much memory callers may share with a server."""

from __future__ import annotations

from dataclasses import dataclass

from expertd.proto.base.errors import Overloaded

MAX_LANES, MAX_CALLER_LANES = 256, 16
"""Of all callers together, and of one."""


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """What one lane has of it."""

    caller: str
    num_bytes: int


class Room:
    """Counts shares, from before their memory is mapped until it is given back."""

    def __init__(self, max_bytes: int) -> None:
        """Of all callers together; one may have half of it."""
        self._max_bytes = max_bytes
        self._shares: set[Share] = set()

    @property
    def taken_bytes(self) -> int:
        return sum(share.num_bytes for share in self._shares)

    def take(self, caller: str, num_bytes: int) -> Share:
        """Raises `Overloaded`, which names the bound."""
        own = [share.num_bytes for share in self._shares if share.caller == caller]
        left = self._max_bytes - self.taken_bytes
        if num_bytes > left:
            raise Overloaded(f"the segment has {num_bytes} bytes; {left} are left of --shared-memory-bytes")
        left = self._max_bytes // 2 - sum(own)
        if num_bytes > left:
            raise Overloaded(
                f"the segment has {num_bytes} bytes; {left} are left of the half of --shared-memory-bytes"
                f" that {caller} may have"
            )
        if len(own) >= MAX_CALLER_LANES:
            raise Overloaded(f"{caller} has {len(own)} lanes, as many as one may have")
        if len(self._shares) >= MAX_LANES:
            raise Overloaded(f"there are {len(self._shares)} lanes, as many as there may be")
        share = Share(caller, num_bytes)
        self._shares.add(share)
        return share

    def give_back(self, share: Share) -> None:
        self._shares.remove(share)
