"""`expertd status`: whether servers make a whole fleet of one model, and what is missing or mixed."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from expertd.client.fleet.ports import EITHER_PORT, grpc_addresses, seconds
from expertd.client.fleet.survey import Judgement, Seen, judge, survey
from expertd.client.transport.security import ClientSecurity, add_security_arguments, security_from
from expertd.kernels.model.ranges import describe_experts, format_ranges

COLUMNS = ("server", "health", "experts", "layers", "model", "weights", "version", "backend", "epoch")
SHORT = 12
"""Digits of a fingerprint; --json has all."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("servers", nargs="+", metavar="ADDRESS", help=f"all servers of the fleet: {EITHER_PORT}")
    parser.add_argument(
        "--timeout", type=seconds, default=4.0, metavar="SECONDS", help="to wait for each answer (default: 4)"
    )
    parser.add_argument("--json", action="store_true", help="print an object with servers, problems, notes, replicas")
    add_security_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """0 when every expert of one model has an owner and all servers serve, 1 when not, 2 for unusable options."""
    try:
        with Console(stderr=True).status("asking servers"):
            seen = asyncio.run(_survey(arguments.servers, security_from(arguments), arguments.timeout))
    except ValueError as error:
        print(f"expertd status: error: {error}", file=sys.stderr)
        return 2
    judgement = judge(seen)
    if arguments.json:
        print(json.dumps({"servers": [_as_json(one) for one in seen], **dataclasses.asdict(judgement)}, indent=1))
    else:
        _show(seen, judgement, _console())
    return 1 if judgement.problems else 0


async def _survey(servers: Sequence[str], security: ClientSecurity, timeout: float) -> list[Seen]:
    return await survey(await grpc_addresses(list(dict.fromkeys(servers))), security, timeout)


def _console() -> Console:
    console = Console(highlight=False, soft_wrap=True)
    # Not cut where the output is no terminal: a file or a pipe has no width.
    return console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=200)


def _as_json(one: Seen) -> dict[str, Any]:
    shard = one.shard
    if shard is None:
        return {"address": one.address, "health": one.health}
    return {
        "address": one.address,
        "health": one.health,
        "experts": describe_experts(shard.experts),
        "layers": format_ranges(shard.layers),
        "model_fingerprint": shard.model_fingerprint,
        "placement_epoch": shard.placement_epoch,
        "weights": shard.weights,
        "version": shard.version,
        "backend": shard.backend,
        "device": shard.device,
        "locality": shard.locality,
    }


def _show(seen: Sequence[Seen], judgement: Judgement, console: Console) -> None:
    table = Table(*COLUMNS, box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in table.columns[:2]:
        # On a narrow terminal the others lose their ends.
        column.no_wrap, column.overflow = True, "fold"
    for one in seen:
        told = _as_json(one)
        health = one.health.partition(":")[0]
        if one.shard is None:
            table.add_row(one.address, f"[red]{health}[/red]")
            continue
        table.add_row(
            one.address,
            health if health == "SERVING" else f"[red]{health}[/red]",
            told["experts"],
            told["layers"],
            told["model_fingerprint"][:SHORT],
            told["weights"],
            told["version"],
            told["backend"],
            str(told["placement_epoch"]),
        )
    console.print(table)
    for problem in judgement.problems:
        console.print(f"[red]problem[/red]: {problem}")
    for note in judgement.notes:
        console.print(f"[yellow]note[/yellow]: {note}")
    if judgement.replicas is not None:
        fewest, most = judgement.replicas
        console.print(f"every expert has {fewest} to {most} owners" if fewest else f"at most {most} owners an expert")
    console.print("[red]NOT WHOLE[/red]" if judgement.problems else "[green]OK[/green]: the fleet is whole")
