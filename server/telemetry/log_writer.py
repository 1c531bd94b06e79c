"""Writes the log on a thread of its own, so that whoever logs never waits for a reader of standard error."""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
import threading
from queue import SimpleQueue

log = logging.getLogger(__name__)
MOST_LINES = 1 << 14
"""That may wait; further ones are dropped and counted."""
FLUSH_SECONDS = 1.0


class LogWriter(logging.Handler):
    """Puts records in a queue; a thread writes them to standard error, however long that takes."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped = 0
        """Lines that found no room."""
        self._told = 0
        self._waiting: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._descriptor = _own_standard_error()
        threading.Thread(target=self._run, name="log-writer", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self.say(self.format(record))
        except Exception:
            self.handleError(record)

    def say(self, line: str) -> None:
        """Write what is no record, in turn."""
        if self._waiting.qsize() < MOST_LINES:
            self._waiting.put(line)
        else:
            self.dropped += 1

    def flush(self) -> None:
        """Wait until what was said is written, but not for long: `logging` calls it at exit."""
        written = threading.Event()
        self._waiting.put(written)
        written.wait(FLUSH_SECONDS)

    def _run(self) -> None:
        while True:
            # All that waits at once: each write may cost a turn at the interpreter.
            batch = [self._waiting.get()]
            while not self._waiting.empty():
                batch.append(self._waiting.get())
            lines = [line for line in batch if isinstance(line, str)]
            # Those that were dropped until now came after these.
            if lost := self.dropped - self._told:
                self._told += lost
                lines.append(self._notice(lost))
            self._write("".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
            for flushed in batch:
                if isinstance(flushed, threading.Event):
                    flushed.set()

    def _write(self, data: bytes) -> None:
        # Without a reader there is nobody to tell of it.
        with contextlib.suppress(OSError):
            while data:
                data = data[os.write(self._descriptor, data) :]

    def _notice(self, lost: int) -> str:
        message = "%d lines were dropped: standard error was not read"
        return self.format(log.makeRecord(log.name, logging.WARNING, __file__, 0, message, (lost,), None))


def _own_standard_error() -> int:
    """A descriptor that writes to standard error and waits. Where that is a pipe, nothing else in the process waits for
    it from now on, gRPC's core above all: what finds it full is lost."""
    standard = sys.__stderr__.fileno() if sys.__stderr__ else 2
    try:
        if stat.S_ISFIFO(os.fstat(standard).st_mode):
            # Opened anew: the flags of this one are those of its other holders too.
            path = f"/proc/self/fd/{standard}"
            own = os.open(path, os.O_WRONLY)
            hurried = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            os.dup2(hurried, standard)
            os.close(hurried)
            return own
    except OSError:
        log.debug("standard error cannot be opened anew", exc_info=True)
    return os.dup(standard)
