"""`expertd rebalance`: what should move between running servers, so that the loads of their devices are even."""

from __future__ import annotations

import argparse
import json
import math
import time
from contextlib import aclosing
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from expertd.client.fleet.discovery import Discovery, DnsServers, FileServers, StaticServers
from expertd.client.fleet.ports import EITHER_PORT, explained, grpc_addresses, seconds
from expertd.client.placement.admin import add_admin_arguments, admin_security_from, exit_code
from expertd.client.placement.assignment import InvalidPlan
from expertd.client.placement.carry_out import carry_out
from expertd.client.placement.packing import Floats
from expertd.client.placement.present import Present, heat_of, look, recorded_heat
from expertd.client.placement.proposal import Proposal, propose, reason_to_wait
from expertd.client.placement.watching import locked, repeat
from expertd.client.transport.security import security_from
from expertd.proto.base.errors import StalePlacement

SHOWN_SERVERS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("servers", nargs="*", metavar="ADDRESS", help=f"all servers of the fleet: {EITHER_PORT}")
    parser.add_argument("--servers-file", type=Path, metavar="FILE", help="or a file with one a line, read every time")
    parser.add_argument("--dns", metavar="HOST:PORT", help="or a name with the addresses of all, and their port")
    parser.add_argument(
        "--over", type=seconds, default=10.0, metavar="SECONDS", help="for which loads are watched (default: 10)"
    )
    parser.add_argument(
        "--loads",
        nargs="+",
        metavar="FILE",
        help="loads recorded before, as 'expertd plan' takes them, in place of that",
    )
    parser.add_argument(
        "--slots",
        type=_positive,
        metavar="N",
        help="experts of each layer that a server can hold, on several devices in equal parts and at most what each has"
        " room for (default: that room; without several devices as many as it has in any layer, where it has some)",
    )
    parser.add_argument(
        "--leave",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="one of the servers, which is to own nothing, before it is drained; if it does not serve, its experts are"
        " placed elsewhere",
    )
    parser.add_argument(
        "--most-moves",
        type=_positive,
        metavar="N",
        help="experts to move at most, in a round, beside those that nobody owns or that are parked on the way",
    )
    parser.add_argument("--most-bytes", type=_positive, metavar="N", help="the same in bytes of experts")
    parser.add_argument(
        "--below", type=_share, default=0.95, help="move only if balancedness is below this (default: 0.95)"
    )
    parser.add_argument("--gain", type=_share, default=0.01, help="and would gain this much (default: 0.01)")
    parser.add_argument(
        "--watch", type=seconds, metavar="SECONDS", help="again and again, each time by the loads of these seconds"
    )
    parser.add_argument(
        "--pause",
        type=_pause,
        default=0.2,
        metavar="SECONDS",
        help="between two updates, so that no call meets many of them (default: 0.2)",
    )
    parser.add_argument(
        "--lock",
        type=Path,
        metavar="FILE",
        help="of all with the same FILE on this machine one moves experts at a time",
    )
    parser.add_argument(
        "--rate", type=_positive, metavar="N", help="bytes a second that servers read, to tell the time"
    )
    told = parser.add_mutually_exclusive_group()
    told.add_argument("--json", action="store_true", help="print what would move as an object")
    told.add_argument("--apply", action="store_true", help="and move it, server by server, while all serve")
    add_admin_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """See `exit_code`."""
    return exit_code("rebalance", rebalance(arguments), arguments)


def _positive(text: str) -> int:
    """A count as people write it, such as 50e9."""
    value = float(text)
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no count; it must be at least 1")
    return int(value)


def _pause(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no pause; it must be at least 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no balancedness; it must be from 0 to 1")
    return value


async def rebalance(arguments: argparse.Namespace) -> None:
    """Once, or with --watch until it is cancelled. Raises `InvalidPlan`, `ExpertdError`, `OSError` or `ValueError`."""
    console = Console(highlight=False, width=max(Console().width, 120))
    if arguments.watch is None:
        await _round(arguments, console)
        return
    # What can never work ends it; what fails later may work the next time.
    await _addresses(arguments)

    def tell(error: Exception) -> None:
        console.print(f"not this time: {explained(error, security_from(arguments))}")

    await repeat(arguments.watch, lambda: _round(arguments, console), tell)


async def _round(arguments: argparse.Namespace, console: Console) -> None:
    seen = await _look(arguments)
    heat = await _heat(arguments, seen)
    with locked(arguments.lock if arguments.apply else None):
        proposal = await _propose(arguments, seen, heat)
        if arguments.json:
            print(json.dumps(proposal.as_json(), indent=1))
            return
        if arguments.watch is None:
            _show(proposal, console)
        console.print(proposal.summary(arguments.rate))
        reason, held = reason_to_wait(proposal, arguments.below, arguments.gain), proposal.present.held
        if reason is not None:
            console.print(f"not to be done: {reason}")
        elif arguments.apply:
            await _apply(proposal, arguments, console)
            held = proposal.target
        for name in proposal.idle(held):
            console.print(f"{name} owns nothing, nor is it to: it can be drained")


async def _heat(arguments: argparse.Namespace, present: Present) -> Floats:
    """[layers, experts]: what was asked for, for as long as a round takes."""
    if arguments.loads is not None:
        return recorded_heat(present, arguments.loads)
    with Console(stderr=True).status("watching loads"):
        return await heat_of(present, arguments.over if arguments.watch is None else arguments.watch)


async def _propose(arguments: argparse.Namespace, seen: Present, heat: Floats) -> Proposal:
    """For the fleet as it is now. Raises `InvalidPlan` or `ExpertdError`."""
    present = await _look(arguments)
    if present.layers != seen.layers:
        raise StalePlacement("servers took layers over or gave them up while loads were watched; run it again")
    slots = present.slots(arguments.slots, await grpc_addresses(arguments.leave))
    proposal = propose(present, heat, slots, _most_moves(arguments, present))
    if not heat.any() and not proposal.is_due:
        raise InvalidPlan("there was no traffic at all: nothing says which experts are busy; watch longer (--over)")
    return proposal


async def _apply(proposal: Proposal, arguments: argparse.Namespace, console: Console) -> None:
    security = security_from(arguments)
    admin = admin_security_from(arguments)
    servers = proposal.present.servers
    # One that is gone already would be waited for every time.
    leaving = set(await grpc_addresses(arguments.leave)) & set(servers)
    begun, read, done = time.monotonic(), 0, 0
    try:
        with Console(stderr=True).status("moving experts") as status:
            async with aclosing(
                carry_out(proposal, lambda: look(servers, security, leaving), admin, arguments.pause)
            ) as updating:
                async for _, size in updating:
                    done, read = done + 1, read + size
                    status.update(f"{done} of {len(proposal.updates)} updates, {read / 1e9:.3g} GB")
    finally:
        took = time.monotonic() - begun
        console.print(
            f"{done} of {len(proposal.updates)} updates done: {read} bytes read in {took:.1f} s"
            f" ({read / took / 1e9:.3g} GB/s)"
        )


async def _look(arguments: argparse.Namespace) -> Present:
    return await look(await _addresses(arguments), security_from(arguments), await grpc_addresses(arguments.leave))


async def _addresses(arguments: argparse.Namespace) -> list[str]:
    return list(dict.fromkeys(await grpc_addresses(await _discovery(arguments).addresses())))


def _discovery(arguments: argparse.Namespace) -> Discovery:
    given = (bool(arguments.servers), arguments.servers_file is not None, arguments.dns is not None)
    if sum(given) != 1:
        raise ValueError("give all servers as ADDRESS..., or --servers-file, or --dns: one of them")
    if arguments.servers_file is not None:
        return FileServers(arguments.servers_file)
    if arguments.dns is not None:
        host, _, port = arguments.dns.rpartition(":")
        if not (host and port.isdecimal()):
            raise ValueError(f"--dns is {arguments.dns!r}; give HOST:PORT")
        return DnsServers(host, int(port))
    return StaticServers(tuple(arguments.servers))


def _most_moves(arguments: argparse.Namespace, present: Present) -> int | None:
    limits = [arguments.most_moves, arguments.most_bytes and arguments.most_bytes // present.expert_bytes]
    return min((limit for limit in limits if limit is not None), default=None)


def _show(proposal: Proposal, console: Console) -> None:
    table = Table("server", "takes over", "gives up", "load / mean", "then", box=SIMPLE)
    loads = [proposal.mean_loads(held) for held in (proposal.present.held, proposal.target)]
    for server, name in enumerate(proposal.present.servers[:SHOWN_SERVERS]):
        mine = [update for update in proposal.updates if update.server == server]
        taken, given = sum(int(one.taken.sum()) for one in mine), sum(int(one.given.sum()) for one in mine)
        table.add_row(name, str(taken), str(given), *(_load(load[server]) for load in loads))
    console.print(table)
    if len(proposal.present.servers) > SHOWN_SERVERS:
        console.print(f"and {len(proposal.present.servers) - SHOWN_SERVERS} more servers; --json has them all")


def _load(devices: Floats) -> str:
    """The mean of a server's devices [devices], and the largest, where there are several."""
    largest = f", busiest device {devices.max():.3f}" if len(devices) > 1 else ""
    return f"{devices.mean():.3f}{largest}"
