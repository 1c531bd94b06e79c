"""`expertd top`: a fleet in a terminal, from what its servers' metrics ports tell."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import os
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from expertd.client.fleet.groups import Holding, by_model, faults
from expertd.client.fleet.ports import EITHER_PORT, NoMetricsPort, explained, metrics_addresses, read_status
from expertd.client.transport.security import add_security_arguments, security_from
from expertd.kernels.model.ranges import describe_experts
from expertd.proto.base.errors import ExpertdError

SHOWN_ERRORS = 5
SHORT = 12
"""Digits of a fingerprint."""
COLUMNS = ("server", "state", "experts", "tokens/s", "", "req/s", "p50", "p99", "queue", "even", "errors", "up")
LEFT = ("server", "state", "experts", "")
WIDEST = {"experts": 24, "": 20}
"""Columns whose text could fill the terminal."""
WIDE = 110
"""Characters of a terminal that has room for all columns; a narrower one does without `LUXURIES`."""
LUXURIES = ("", "req/s", "even", "up")
WRAPPED = ("server", "experts", "")
NARROW = 80
"""Characters of a terminal from which on an IPv4 address with its port stays on one line."""
ORDERS: dict[str, Callable[[dict[str, Any]], float]] = {
    "tokens": lambda status: -status["tokens_per_second"],
    "p99": lambda status: -status["stages"].get("total", {"p99": 0.0})["p99"],
    "queue": lambda status: -status["queue"]["tokens"],
    "errors": lambda status: -_refused(status),
    "up": lambda status: status["uptime"],
}


@dataclass(frozen=True, slots=True)
class Seen:
    """What one metrics port answered."""

    address: str
    status: dict[str, Any] | None
    """The content of /status.json; None when it cannot be had."""
    problem: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("addresses", nargs="+", metavar="ADDRESS", help=f"servers: {EITHER_PORT}")
    parser.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: 2)")
    parser.add_argument("--sort", choices=list(ORDERS), help="most first (up: newest first); default: as given")
    parser.add_argument(
        "--filter", default="", metavar="TEXT", help="only servers with this in their address, state or experts"
    )
    add_security_arguments(parser)
    parser.add_argument(
        "--once",
        action="store_true",
        help="look once, print, and exit 1 unless all are ready and a whole fleet of one model",
    )


def run(arguments: argparse.Namespace) -> int:
    """0 after q or Ctrl-C, or of `--once` where all servers are ready and a whole fleet, else 1; 2: no address."""
    console = Console(highlight=False)
    try:
        if arguments.interval <= 0:
            raise ValueError(f"--interval is {arguments.interval:g}; it must be greater than 0")
        security = security_from(arguments)
        arguments.addresses = asyncio.run(metrics_addresses(arguments.addresses, security))
    except ExpertdError as error:
        print(f"expertd top: error: {explained(error, security)}", file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"expertd top: error: {error}", file=sys.stderr)
        return 2
    if arguments.once or not console.is_terminal:
        looked = asyncio.run(look(arguments.addresses))
        seen = chosen(looked, arguments.sort, arguments.filter)
        # Not cut where the output is no terminal: a file or a pipe has no width.
        width = console.width if console.is_terminal else 200
        Console(highlight=False, width=width).print(render(seen, time.time(), width, looked))
        ready = all(one.status is not None and one.status["ready"] for one in seen)
        return 0 if ready and not faults(_holdings(looked))[0] else 1
    try:
        asyncio.run(_watch(arguments, console))
    except KeyboardInterrupt:
        return 0
    return 0


async def look(addresses: Sequence[str]) -> list[Seen]:
    """Ask all metrics ports at once."""
    return await asyncio.gather(*(asyncio.to_thread(_read, address) for address in addresses))


def chosen(seen: Sequence[Seen], order: str | None, text: str) -> list[Seen]:
    """Those that have `text` in what is told of them, in that order; who does not answer comes last."""
    found = [one for one in seen if text in _words(one)]
    if order is None:
        return found
    key = ORDERS[order]
    return sorted(found, key=lambda one: math.inf if one.status is None else key(one.status))


def render(seen: Sequence[Seen], now: float, width: int = 200, fleet: Sequence[Seen] | None = None) -> RenderableType:
    """The sum and the table of all servers, what is wrong with them, and their latest errors; `now` in Unix time.

    Those of a mixed fleet are grouped by model. `fleet`: all servers, where `seen` are some of them.
    """
    columns = [name for name in COLUMNS if width >= WIDE or name not in LUXURIES]
    statuses = [one.status for one in seen if one.status is not None]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1 if width >= WIDE else 0, 0, 0))
    whole = width >= NARROW and all(len(one.address) <= len("255.255.255.255:65535") for one in seen)
    for name in columns:
        # The bars give way where the terminal is narrow; long addresses go on in a second line before figures are cut.
        table.add_column(
            name,
            justify="left" if name in LEFT else "right",
            no_wrap=name not in WRAPPED or (whole and name == "server"),
            overflow="fold",
            max_width=WIDEST.get(name),
        )
    busiest = max((status["tokens_per_second"] for status in statuses), default=0.0)
    whole_fleet = _holdings(seen if fleet is None else fleet)
    models = list(by_model(whole_fleet))
    former = None
    for one in sorted(seen, key=partial(_place, models)):
        if len(models) > 1 and one.status is not None and one.status["model_fingerprint"] != former:
            former = one.status["model_fingerprint"]
            table.add_row(Text(f"model {former[:SHORT]}", "bold"))
        if one.status is None:
            table.add_row(one.address, Text("no answer", "bold red"))
        else:
            cells = dict(zip(COLUMNS, _row(one.address, one.status, busiest), strict=True))
            table.add_row(*(cells[name] for name in columns))
    ready = sum(status["ready"] for status in statuses)
    tokens, requests = (sum(status[f"{name}_per_second"] for status in statuses) for name in ("tokens", "requests"))
    total = Text.assemble(
        (f"{ready} of {len(seen)} servers ready", "bold green" if ready == len(seen) else "bold red"),
        f"   {_short(tokens)} tokens/s   {_short(requests)} requests/s",
        (f"   {time.strftime('%H:%M:%S', time.localtime(now))}", "dim"),
    )
    wrong, states = faults(whole_fleet)
    mixed = [Text(f"fleet: {fault}", "bold red") for fault in wrong] + [Text(f"fleet: {state}") for state in states]
    return Group(total, table, *mixed, *_lost(seen), *_problems(seen), *_errors(seen))


async def _watch(arguments: argparse.Namespace, console: Console) -> None:
    with _keys() as pressed, Live(console=console, screen=True, auto_refresh=False) as live:
        while not pressed.is_set():
            fleet = await look(arguments.addresses)
            seen = chosen(fleet, arguments.sort, arguments.filter)
            live.update(render(seen, time.time(), console.width, fleet), refresh=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(pressed.wait(), arguments.interval)


@contextlib.contextmanager
def _keys() -> Iterator[asyncio.Event]:
    """Set once q is pressed; keys are read one by one and not shown, as long as the block lasts."""
    pressed = asyncio.Event()
    if not sys.stdin.isatty():
        yield pressed
        return
    terminal, loop = sys.stdin.fileno(), asyncio.get_running_loop()
    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)

    def read() -> None:
        if b"q" in os.read(terminal, 64):
            pressed.set()

    loop.add_reader(terminal, read)
    try:
        yield pressed
    finally:
        loop.remove_reader(terminal)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def _read(address: str) -> Seen:
    try:
        return Seen(address, read_status(address))
    except NoMetricsPort as error:
        return Seen(address, None, str(error))


def _holdings(seen: Sequence[Seen]) -> list[Holding]:
    """What those that answer own."""
    told = [(one.address, one.status) for one in seen if one.status is not None]
    return [
        Holding(
            address,
            status["model_fingerprint"],
            _owned(status["loads"]),
            status["routed_experts"],
        )
        for address, status in told
    ]


def _owned(loads: dict[str, Any]) -> dict[int, list[int]]:
    """The experts of each layer: those of which there are numbers."""
    return {
        layer: [expert for expert, pairs in zip(loads["experts"], row, strict=True) if pairs is not None]
        for layer, row in zip(loads["layers"], loads["pairs"], strict=True)
    }


def _place(models: Sequence[str], one: Seen) -> int:
    """Of a server in the table: by its model, last where it does not answer and there are several."""
    if len(models) < 2:
        return 0
    return len(models) if one.status is None else models.index(one.status["model_fingerprint"])


def _row(address: str, status: dict[str, Any], busiest: float) -> list[RenderableType]:
    queue, loads = status["queue"], status["loads"]
    total = status["stages"].get("total")
    filled = queue["tokens"] / queue["capacity"]
    balance = list(loads["balance"].values())
    refused = _refused(status)
    share = status["tokens_per_second"] / busiest if busiest else 0.0
    return [
        address,
        Text("ready", "green") if status["ready"] else Text("not ready", "yellow"),
        describe_experts(_owned(loads)),
        _short(status["tokens_per_second"]),
        ProgressBar(total=1.0, completed=share, complete_style="cyan", finished_style="cyan"),
        _short(status["requests_per_second"]),
        _time(total["p50"]) if total else "-",
        _time(total["p99"]) if total else "-",
        Text(f"{filled:.0%}", "bold red" if filled > 0.8 else ""),
        f"{sum(balance) / len(balance):.0%}" if balance else "-",
        Text(_short(refused), "red" if refused else "dim"),
        _age(status["uptime"]),
    ]


def _lost(seen: Sequence[Seen]) -> list[Text]:
    """Devices that compute nothing any more; servers older than these say nothing of devices."""
    return [
        Text(f"{one.address}: device {device['number']} of {len(devices)} is lost: {device['lost']}", "bold red")
        for one in seen
        for devices in [(one.status or {}).get("devices", [])]
        for device in devices
        if device["lost"]
    ]


def _refused(status: dict[str, Any]) -> int:
    return int(sum(status["outcomes"].values()) - status["outcomes"].get("ok", 0))


def _words(one: Seen) -> str:
    if one.status is None:
        return f"{one.address} no answer"
    state = "ready" if one.status["ready"] else "not ready"
    return f"{one.address} {state} {describe_experts(_owned(one.status['loads']))}"


def _problems(seen: Sequence[Seen]) -> list[Text]:
    """Why servers are not ready."""
    reasons = [(one.address, one.problem if one.status is None else one.status["reason"]) for one in seen]
    return [Text.assemble(f"{address} ", (reason, "yellow")) for address, reason in reasons if reason]


def _errors(seen: Sequence[Seen]) -> list[Text]:
    errors = [(error, one.address) for one in seen if one.status for error in one.status["errors"]]
    errors.sort(key=lambda entry: -entry[0]["time"])
    return [
        Text.assemble(
            (time.strftime("%H:%M:%S ", time.localtime(error["time"])), "dim"),
            f"{address} ",
            (error["outcome"], "red"),
            f" {error['message']}",
            overflow="ellipsis",
            no_wrap=True,
        )
        for error, address in errors[:SHOWN_ERRORS]
    ]


def _short(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def _time(seconds: float) -> str:
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g}{unit}"
    return f"{seconds * 1e6:.3g}us"


def _age(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f}{unit}"
    return f"{seconds:.0f}s"
