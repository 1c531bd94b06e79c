"""`expertd plan`: from recorded heat and a fleet to the experts of every server, layer by layer or the same in all."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.status import Status
from rich.table import Table

from expertd.client.fleet.ports import EITHER_PORT, TIMEOUT, explained, grpc_addresses, metrics_addresses
from expertd.client.fleet.survey import judge, survey
from expertd.client.placement.assignment import (
    Fleet,
    InvalidPlan,
    Placement,
    balancedness,
    device_heat,
    place,
    place_by_layer,
)
from expertd.client.placement.heat import parse_json, read_heat
from expertd.client.placement.packing import Floats
from expertd.client.placement.simulate import Simulation, plot, simulate
from expertd.client.transport.security import ClientSecurity, add_security_arguments, security_from
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.model.ranges import format_ranges
from expertd.proto.base.errors import ExpertdError

SHOWN_SERVERS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loads",
        nargs="+",
        metavar="FILE_OR_SERVER",
        help='tokens that each expert got: JSON by layer, such as {"3": [812, 40, ...], "4": ...}, or servers that run'
        f" with --per-expert-metrics, added up: {EITHER_PORT}, or the URL of their /metrics",
    )
    add_security_arguments(parser)
    parser.add_argument(
        "--fleet",
        type=Path,
        help='JSON: [{"name": "node0:50051", "slots": 40, "node": "rack1"}, ...]; node is optional',
    )
    parser.add_argument("--servers", type=int, help="number of servers, all alike, in place of --fleet")
    parser.add_argument("--slots", type=int, default=32, help="experts that each of --servers can hold (default: 32)")
    parser.add_argument("--nodes", type=int, default=1, help="nodes or racks that --servers stand in (default: 1)")
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        help="devices of each server, which have its slots in equal parts, and are what is to be even (default: 1)",
    )
    parser.add_argument(
        "--groups", type=int, default=1, help="expert groups to keep together on nodes; DeepSeek-V3 has 8 (default: 1)"
    )
    parser.add_argument(
        "--same-in-all-layers",
        action="store_true",
        help="one list for each server, as 'expertd serve --experts' takes it, in place of one for each layer",
    )
    parser.add_argument("--output", type=Path, help="file to write the plan to, as JSON")
    parser.add_argument(
        "--save-loads", type=Path, help="file to write what was read to, for --loads and 'expertd serve --device-loads'"
    )
    parser.add_argument(
        "--simulate", action="store_true", help="route random tokens over fleets of 8 to 10,000 servers instead"
    )
    parser.add_argument("--zipf", type=float, default=1.0, help="skew of the simulated experts (default: 1.0)")
    parser.add_argument("--plot", type=Path, help="PNG to draw the simulation to; needs the extra 'plot'")


def run(arguments: argparse.Namespace) -> int:
    """0 when a plan was made, 2 when its inputs allow none."""
    console = Console(highlight=False, width=max(Console().width, 120))
    try:
        if arguments.simulate:
            _simulate(arguments, console)
        else:
            _plan(arguments, console)
    except ExpertdError as error:
        print(f"expertd plan: error: {explained(error, security_from(arguments))}", file=sys.stderr)
        return 2
    except (InvalidPlan, OSError, ValueError) as error:
        print(f"expertd plan: error: {error}", file=sys.stderr)
        return 2
    return 0


def _is_bare(source: str) -> bool:
    """Whether it is a URL without a path."""
    return "://" in source and source.rstrip("/").count("/") == 2


def read_fleet(file: Path, devices: int = 1) -> Fleet:
    """A fleet from a JSON list of servers, of as many devices each. Raises `InvalidPlan`."""
    try:
        text = file.read_text(errors="replace")
    except OSError as error:
        raise InvalidPlan(f"--fleet {file} cannot be read: {error.strerror}") from None
    fields = parse_json(file, text)
    if not (isinstance(fields, list) and fields):
        raise InvalidPlan(f"{file} must hold a JSON list of servers")
    for index, server in enumerate(fields):
        if not (isinstance(server, dict) and isinstance(server.get("name"), str) and type(server.get("slots")) is int):
            raise InvalidPlan(f"{file}: server {index} needs a name (text) and slots (a whole number)")
    nodes = [str(server.get("node", "")) for server in fields]
    order = {node: index for index, node in enumerate(dict.fromkeys(nodes))}
    return Fleet(
        tuple(server["slots"] for server in fields),
        tuple(order[node] for node in nodes),
        tuple(server["name"] for server in fields),
        devices,
    )


def describe(placements: Sequence[Placement], fleet: Fleet, layers: Sequence[int], heat: Floats) -> dict[str, Any]:
    """What `--output` holds, for one placement for each layer of `heat` [layers, experts].

    expected_load is a server's share of a mean server, averaged over layers; expected_device_loads are shares of a
    mean device, where servers have several.
    """
    shares = device_heat(placements, heat, fleet)
    busy = shares[shares.sum(axis=1) > 0]
    relative = (busy / busy.mean(axis=1, keepdims=True)).mean(axis=0) if len(busy) else np.ones(shares.shape[1])
    each = relative.reshape(-1, fleet.devices)
    return {
        "policy": placements[0].policy,
        "balancedness": balancedness(shares),
        "balancedness_by_layer": {layer: balancedness(row[None]) for layer, row in zip(layers, shares, strict=True)},
        "servers": [
            {
                "name": name,
                **_experts_of(server, placements, layers),
                "expected_load": float(each[server].mean()),
                **({"expected_device_loads": each[server].tolist()} if fleet.devices > 1 else {}),
            }
            for server, name in enumerate(fleet.names)
        ],
    }


def _experts_of(server: int, placements: Sequence[Placement], layers: Sequence[int]) -> dict[str, Any]:
    """One list where all layers have one placement."""
    if _alike(placements):
        return {"experts": format_ranges(placements[0].experts_of(server))}
    lists = [format_ranges(one.experts_of(server)) for one in placements]
    return {"experts_by_layer": dict(zip(layers, lists, strict=True))}


def _plan(arguments: argparse.Namespace, console: Console) -> None:
    if arguments.loads is None or (arguments.fleet is None) == (arguments.servers is None):
        raise InvalidPlan("give --loads and either --fleet or --servers, or --simulate alone")
    if arguments.plot is not None:
        raise InvalidPlan("--plot draws a simulation; give --simulate with it")
    with _working("reading loads"):
        layers, heat = read_heat(asyncio.run(_sources(arguments.loads, security_from(arguments))))
    idle = [layer for layer, row in zip(layers, heat, strict=True) if not row.any()]
    if len(idle) == len(layers):
        raise InvalidPlan("--loads tells of no traffic at all: nothing says which experts are busy; record more of it")
    if idle:
        console.print(f"note: --loads tells of no traffic in layers {format_ranges(idle)}; the plan is for the others")
    if arguments.fleet is None:
        fleet = Fleet.uniform(arguments.servers, arguments.slots, arguments.nodes, arguments.devices)
    else:
        fleet = read_fleet(arguments.fleet, arguments.devices)
    with _working("placing experts"):
        if arguments.same_in_all_layers:
            placements = (place(heat, fleet, arguments.groups),) * len(layers)
        else:
            placements = place_by_layer(heat, fleet, arguments.groups)
    plan = describe(placements, fleet, layers, heat)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(plan, indent=1) + "\n")
    if arguments.save_loads is not None:
        arguments.save_loads.write_text(json.dumps(dict(zip(layers, heat.tolist(), strict=True))) + "\n")
    _show(plan, placements, layers, console)
    if fleet.devices > 1:
        rooms = format_ranges(sorted({slots // fleet.devices for slots in fleet.slots}))
        console.print(
            f"each of a server's {fleet.devices} devices has room for {rooms} experts of a layer: start servers with"
            " --devices, --device-experts and, as --save-loads writes them, --device-loads"
        )


def _show(plan: dict[str, Any], placements: Sequence[Placement], layers: Sequence[int], console: Console) -> None:
    table = Table("server", "experts of each layer", "load / mean", box=SIMPLE)
    for index, server in enumerate(plan["servers"][:SHOWN_SERVERS]):
        counts = sorted({len(one.experts_of(index)) for one in placements})
        several = f"{format_ranges(counts)}; --output FILE has them"
        table.add_row(server["name"], server.get("experts", several) or "none", f"{server['expected_load']:.3f}")
    console.print(table)
    if len(plan["servers"]) > SHOWN_SERVERS:
        console.print(f"and {len(plan['servers']) - SHOWN_SERVERS} more servers; --output FILE has them all")
    counted = placements[:1] if _alike(placements) else placements
    copies = np.concatenate([one.copies() for one in counted])
    console.print(
        f"{plan['policy']} placement of {placements[0].held.shape[1]} experts, layers {format_ranges(layers)}; "
        + ("" if len(counted) == 1 else "over all layers ")
        + ", ".join(
            f"{experts} with {count} cop{'y' if count == 1 else 'ies'}"
            for count, experts in sorted(Counter(copies.tolist()).items())
        )
    )
    console.print(f"balancedness (mean load / largest, over all layers): {plan['balancedness']:.4f}")


def _alike(placements: Sequence[Placement]) -> bool:
    return all(one is placements[0] for one in placements)


def _working(what: str) -> Status:
    """Shown on a terminal alone."""
    return Console(stderr=True).status(what)


async def _sources(loads: Sequence[str], security: ClientSecurity) -> list[str]:
    """Files and URLs; those of servers, which must be a whole fleet. Raises `InvalidPlan`."""
    loads = [f"{one.rstrip('/')}/metrics" if _is_bare(one) else one for one in loads]
    servers = [one for one in loads if "://" not in one and not Path(one).exists()]
    if not servers:
        return loads
    try:
        ports = await grpc_addresses(servers)
    except ValueError as error:
        raise InvalidPlan(f"--loads: there is no such file, and as a server: {error}") from None
    if problems := judge(await survey(ports, security, TIMEOUT)).problems:
        more = f" ({len(problems) - 1} more problems: see 'expertd status')" if problems[1:] else ""
        raise InvalidPlan(f"--loads: these servers are no whole fleet of one model: {problems[0]}{more}")
    metrics = await metrics_addresses(servers, security)
    return [*(one for one in loads if one not in servers), *(f"http://{address}/metrics" for address in metrics)]


def _simulate(arguments: argparse.Namespace, console: Console) -> None:
    given = (arguments.loads, arguments.fleet, arguments.servers, arguments.output, arguments.save_loads)
    if given != (None,) * 5 or arguments.devices != 1:
        raise InvalidPlan(
            "--simulate has loads and fleets of its own; leave out --loads, --fleet, --servers, --devices, --output,"
            " --save-loads"
        )
    started = time.perf_counter()
    with _working("simulating"):
        simulations: list[Simulation] = list(simulate(MoeConfig(), arguments.slots, arguments.zipf))
    if not simulations:
        raise InvalidPlan(f"--slots is {arguments.slots}; no simulated fleet has room for all experts: give 1 or more")
    table = Table("servers", "policy", "balancedness", "servers a token", "bytes a token", box=SIMPLE)
    for one in simulations:
        table.add_row(
            f"{one.servers}", one.policy, f"{one.balancedness:.4f}", f"{one.fan_out:.2f}", f"{one.bytes_per_token:.0f}"
        )
    console.print(table)
    console.print(f"{arguments.slots} slots a server, Zipf {arguments.zipf}; {time.perf_counter() - started:.1f} s")
    if arguments.plot is not None:
        plot(simulations, arguments.plot)
        console.print(f"plot in {arguments.plot}")
