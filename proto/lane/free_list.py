"""Which parts of a fixed range of bytes are free."""

from __future__ import annotations


class FreeList:
    """Hands out ranges of `size` bytes, the first that fits; neighbours that are given back grow together again."""

    def __init__(self, size: int) -> None:
        self._free = [(0, size)]
        """(start, end), ascending, none touching another."""

    def take(self, length: int) -> int | None:
        """Where `length` bytes are now taken, or None when no gap is long enough."""
        for index, (start, end) in enumerate(self._free):
            if end - start >= length:
                if end - start == length:
                    del self._free[index]
                else:
                    self._free[index] = (start + length, end)
                return start
        return None

    def give_back(self, start: int, length: int) -> None:
        merged: list[tuple[int, int]] = []
        for gap in sorted([*self._free, (start, start + length)]):
            if merged and merged[-1][1] == gap[0]:
                merged[-1] = (merged[-1][0], gap[1])
            else:
                merged.append(gap)
        self._free = merged
