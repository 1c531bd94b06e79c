"""Faults on purpose, for tests: asked for by the environment of a starting process, out of reach of every RPC.

    EXPERTD_FAILPOINTS="delay=0.2:0.05,crash_before=0.01,seed=7" expertd serve ...

Each kind has the probability with which it strikes, some a number of seconds. docs/testing.md describes them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from functools import partial
from pathlib import Path

from expertd._native import Failpoints
from expertd.server.options.config import InvalidOption

log = logging.getLogger(__name__)
VARIABLE = "EXPERTD_FAILPOINTS"
FOREVER = 1e9
LASTING = {"delay": 0.05, "drop": FOREVER, "stuck_device": FOREVER, "slow_loading": 1.0}
AT_ONCE = (
    *("reset", "corrupt_request", "corrupt_reply", "wrong_receipt", "crash_before", "crash_after"),
    *("device_error", "lost_device"),
)
SECONDS = LASTING | dict.fromkeys((*AT_ONCE, "stale_epoch"), 0.0)
"""The kinds, and how long those last that take time, unless told otherwise."""


def failpoints_from_environment() -> Failpoints | None:
    """None, unless the variable is set. Raises `InvalidOption`."""
    text = os.environ.get(VARIABLE, "")
    if not text:
        return None
    log.warning("failpoints are on, for tests only: %s", text)
    return parse_failpoints(text)


def parse_failpoints(text: str) -> Failpoints:
    """Read `kind=probability[:seconds],...[,seed=N]`. Raises `InvalidOption`."""
    settings = dict(item.partition("=")[::2] for item in text.split(","))
    failpoints = Failpoints(settings.pop("seed", "0"))
    for kind, value in settings.items():
        if kind not in SECONDS:
            raise InvalidOption(f"{VARIABLE} names {kind!r}; choose from {', '.join(SECONDS)}")
        probability, _, seconds = value.partition(":")
        try:
            chance, duration = float(probability), float(seconds or SECONDS[kind])
        except ValueError:
            raise InvalidOption(f"{VARIABLE} has {kind}={value}; it must be probability[:seconds]") from None
        if not 0.0 <= chance <= 1.0:
            raise InvalidOption(f"{VARIABLE} has {kind}={value}; a probability is from 0 to 1")
        failpoints.add(kind, chance, duration)
    return failpoints


async def watch(failpoints: Failpoints) -> None:
    """Tell the log of what strikes, and do what the engine does not, until cancelled."""
    loop = asyncio.get_running_loop()
    loop.add_reader(failpoints.fileno(), partial(_take_strikes, failpoints))
    try:
        await loop.create_future()
    finally:
        loop.remove_reader(failpoints.fileno())


def _take_strikes(failpoints: Failpoints) -> None:
    for kind, caller in failpoints.take_strikes():
        log.warning("failpoint %s strikes", kind)
        if kind.startswith("crash"):
            for handler in logging.getLogger().handlers:
                handler.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        if caller.startswith("ip"):
            _reset_connection(caller)


def _reset_connection(peer: str) -> None:
    """End the connection to `peer`, such as ipv4:127.0.0.1:4711, without a word of gRPC."""
    port = int(peer.rpartition(":")[2])
    for entry in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(entry.name))) as connection:
            if connection.family != socket.AF_UNIX and connection.getpeername()[1] == port:
                connection.shutdown(socket.SHUT_RDWR)
