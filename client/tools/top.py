"""`expertd top`: a fleet in a terminal, from what its servers' metrics ports tell."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from expertd.kernels.model.ranges import format_ranges

TIMEOUT = 3.0
SHOWN_ERRORS = 5
COLUMNS = ("server", "state", "experts", "tokens/s", "", "req/s", "p50", "p99", "queue", "even", "errors", "up")
LEFT = ("server", "state", "experts", "")
WIDEST = {"experts": 24, "": 20}
"""Columns whose text could fill the terminal."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What one metrics port answered."""

    address: str
    status: dict[str, Any] | None
    """The content of /status.json; None when it cannot be had."""
    problem: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("addresses", nargs="+", metavar="ADDRESS", help="host:port of a server's --metrics")
    parser.add_argument("--interval", type=float, default=2.0, help="seconds between two looks (default: 2)")
    parser.add_argument("--once", action="store_true", help="look once, print, and exit 1 unless all servers are ready")


def run(arguments: argparse.Namespace) -> int:
    """0 after Ctrl-C or when all servers are ready, 1 when `--once` finds one that is not."""
    console = Console(highlight=False)
    if arguments.once or not console.is_terminal:
        seen = asyncio.run(look(arguments.addresses))
        # Not cut where the output is no terminal: a file or a pipe has no width.
        Console(highlight=False, width=None if console.is_terminal else 200).print(render(seen, time.time()))
        return 0 if all(one.status is not None and one.status["ready"] for one in seen) else 1
    try:
        asyncio.run(_watch(arguments.addresses, arguments.interval, console))
    except KeyboardInterrupt:
        return 0
    return 0


async def look(addresses: Sequence[str]) -> list[Seen]:
    """Ask all metrics ports at once."""
    return await asyncio.gather(*(asyncio.to_thread(_read, address) for address in addresses))


def render(seen: Sequence[Seen], now: float) -> RenderableType:
    """The sum and the table of all servers, what is wrong with them, and their latest errors; `now` in Unix time."""
    statuses = [one.status for one in seen if one.status is not None]
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in COLUMNS:
        # The bars give way where the terminal is narrow.
        table.add_column(
            name, justify="left" if name in LEFT else "right", no_wrap=name != "", max_width=WIDEST.get(name)
        )
    busiest = max((status["tokens_per_second"] for status in statuses), default=0.0)
    for one in seen:
        if one.status is None:
            table.add_row(one.address, Text("no answer", "bold red"))
        else:
            table.add_row(*_row(one.address, one.status, busiest))
    ready = sum(status["ready"] for status in statuses)
    tokens, requests = (sum(status[f"{name}_per_second"] for status in statuses) for name in ("tokens", "requests"))
    total = Text.assemble(
        (f"{ready} of {len(seen)} servers ready", "bold green" if ready == len(seen) else "bold red"),
        f"   {_short(tokens)} tokens/s   {_short(requests)} requests/s",
        (f"   {time.strftime('%H:%M:%S', time.localtime(now))}", "dim"),
    )
    return Group(total, table, *_problems(seen), *_errors(seen))


async def _watch(addresses: Sequence[str], interval: float, console: Console) -> None:
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            live.update(render(await look(addresses), time.time()), refresh=True)
            await asyncio.sleep(interval)


def _read(address: str) -> Seen:
    try:
        with urllib.request.urlopen(f"http://{address}/status.json", timeout=TIMEOUT) as answer:
            return Seen(address, json.load(answer))
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Seen(address, None, getattr(reason, "strerror", None) or str(reason))


def _row(address: str, status: dict[str, Any], busiest: float) -> list[RenderableType]:
    queue, loads, outcomes = status["queue"], status["loads"], status["outcomes"]
    total = status["stages"].get("total")
    filled = queue["tokens"] / queue["capacity"]
    balance = list(loads["balance"].values())
    refused = sum(outcomes.values()) - outcomes.get("ok", 0)
    share = status["tokens_per_second"] / busiest if busiest else 0.0
    return [
        address,
        Text("ready", "green") if status["ready"] else Text("not ready", "yellow"),
        format_ranges(loads["experts"]),
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
