"""`expertd plan`: from recorded heat and a fleet to the `--experts` of every server."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from expertd.client.placement.assignment import Fleet, InvalidPlan, Placement, place
from expertd.client.placement.heat import parse_json, read_heat
from expertd.client.placement.packing import Floats
from expertd.client.placement.simulate import Simulation, plot, simulate
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.model.ranges import format_ranges

SHOWN_SERVERS = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--loads",
        nargs="+",
        metavar="FILE_OR_URL",
        help='tokens that each expert got: JSON by layer, such as {"3": [812, 40, ...], "4": ...}, or the /metrics of'
        " servers that run with --per-expert-metrics, added up",
    )
    parser.add_argument(
        "--fleet",
        type=Path,
        help='JSON: [{"name": "node0:50051", "slots": 40, "node": "rack1"}, ...]; node is optional',
    )
    parser.add_argument("--servers", type=int, help="number of servers, all alike, in place of --fleet")
    parser.add_argument("--slots", type=int, default=32, help="experts that each of --servers can hold (default: 32)")
    parser.add_argument("--nodes", type=int, default=1, help="nodes or racks that --servers stand in (default: 1)")
    parser.add_argument(
        "--groups", type=int, default=1, help="expert groups to keep together on nodes; DeepSeek-V3 has 8 (default: 1)"
    )
    parser.add_argument("--output", type=Path, help="file to write the plan to, as JSON")
    parser.add_argument(
        "--simulate", action="store_true", help="route random tokens over fleets of 8 to 10,000 servers instead"
    )
    parser.add_argument("--zipf", type=float, default=1.0, help="skew of the simulated experts (default: 1.0)")
    parser.add_argument("--plot", type=Path, help="PNG to draw the simulation to; needs the extra 'plot'")


def run(arguments: argparse.Namespace) -> int:
    """0 when a plan was made, 1 when its inputs allow none."""
    console = Console(highlight=False, width=max(Console().width, 120))
    try:
        if arguments.simulate:
            _simulate(arguments, console)
        else:
            _plan(arguments, console)
    except (InvalidPlan, OSError) as error:
        print(f"expertd plan: error: {error}", file=sys.stderr)
        return 1
    return 0


def read_fleet(file: Path) -> Fleet:
    """A fleet from a JSON list of servers. Raises `InvalidPlan`."""
    fields = parse_json(file, file.read_text(errors="replace"))
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
    )


def describe(placement: Placement, fleet: Fleet, layers: tuple[int, ...], heat: Floats) -> dict[str, Any]:
    """What `--output` holds; expected_load is a server's share of a mean server, averaged over layers."""
    busy = heat[heat.sum(axis=1) > 0]
    shares = placement.server_heat(busy)
    relative = (shares / shares.mean(axis=1, keepdims=True)).mean(axis=0) if len(busy) else np.ones(len(fleet.slots))
    return {
        "policy": placement.policy,
        "balancedness": placement.balancedness(heat),
        "balancedness_by_layer": {
            layer: placement.balancedness(row[None]) for layer, row in zip(layers, heat, strict=True)
        },
        "servers": [
            {
                "name": name,
                "experts": format_ranges(placement.experts_of(server)),
                "expected_load": float(relative[server]),
            }
            for server, name in enumerate(fleet.names)
        ],
    }


def _plan(arguments: argparse.Namespace, console: Console) -> None:
    if arguments.loads is None or (arguments.fleet is None) == (arguments.servers is None):
        raise InvalidPlan("give --loads and either --fleet or --servers, or --simulate alone")
    if arguments.plot is not None:
        raise InvalidPlan("--plot draws a simulation; give --simulate with it")
    layers, heat = read_heat(arguments.loads)
    if arguments.fleet is None:
        fleet = Fleet.uniform(arguments.servers, arguments.slots, arguments.nodes)
    else:
        fleet = read_fleet(arguments.fleet)
    placement = place(heat, fleet, arguments.groups)
    plan = describe(placement, fleet, layers, heat)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(plan, indent=1) + "\n")
    table = Table("server", "--experts", "load / mean", box=SIMPLE)
    for server in plan["servers"][:SHOWN_SERVERS]:
        table.add_row(server["name"], server["experts"] or "none", f"{server['expected_load']:.3f}")
    console.print(table)
    if len(fleet.slots) > SHOWN_SERVERS:
        console.print(f"and {len(fleet.slots) - SHOWN_SERVERS} more servers; --output FILE has them all")
    copies = Counter(placement.copies().tolist())
    console.print(
        f"{placement.policy} placement of {heat.shape[1]} experts, layers {format_ranges(layers)}; "
        + ", ".join(
            f"{experts} with {count} cop{'y' if count == 1 else 'ies'}" for count, experts in sorted(copies.items())
        )
    )
    console.print(f"balancedness (mean load / largest, over all layers): {plan['balancedness']:.4f}")


def _simulate(arguments: argparse.Namespace, console: Console) -> None:
    if (arguments.loads, arguments.fleet, arguments.servers, arguments.output) != (None,) * 4:
        raise InvalidPlan("--simulate has loads and fleets of its own; leave out --loads, --fleet, --servers, --output")
    started = time.perf_counter()
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
