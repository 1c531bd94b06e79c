"""How much of what streams sent may be without a taken answer, so that callers who do not read cost bounded memory."""

from __future__ import annotations

import asyncio


class Backlog:
    """Bytes of the requests of all streams whose answers have not been taken yet."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._changed = asyncio.Event()

    def open(self) -> Share:
        """The share of one more stream."""
        return Share(self)

    @property
    def left(self) -> int:
        return self._most - self._held

    def count(self, added: int) -> None:
        self._held += added
        # Those who wait look again; nobody finds it set later.
        self._changed.set()
        self._changed.clear()

    async def changed(self) -> None:
        await self._changed.wait()


class Share:
    """One stream's part of a backlog."""

    def __init__(self, backlog: Backlog) -> None:
        self._backlog = backlog
        self._held = 0

    def took(self, num_bytes: int) -> None:
        """A request of `num_bytes` was read."""
        self._count(num_bytes)

    def gave(self, num_bytes: int) -> None:
        """Its answer was taken, or is not wanted any more."""
        self._count(-num_bytes)

    def close(self) -> None:
        """The stream has ended: nothing that it sent is wanted any more."""
        self._count(-self._held)

    async def room(self) -> None:
        """Wait until the stream holds less than is left for all: whoever does not read leaves room to the others, and
        whoever holds nothing need not wait."""
        while self._held and self._held >= self._backlog.left:
            await self._backlog.changed()

    def _count(self, added: int) -> None:
        self._held += added
        self._backlog.count(added)
