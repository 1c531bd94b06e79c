"""`expertd demo`: eight servers and a coordinator, compared with transformers."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from expertd.client.base.gate import Gate, load_gates
from expertd.client.base.quantiles import p50_p99
from expertd.client.call.result import MoeResult
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.fleet.ports import EITHER_PORT, explained, grpc_addresses
from expertd.client.tools.cluster import LocalCluster, ServerDied, even_shards
from expertd.client.tools.demo_checkpoint import DemoModel, write_checkpoint, write_demo_checkpoint
from expertd.client.tools.oracle import TransformersOracle, load_oracle
from expertd.client.transport.security import ClientSecurity, add_security_arguments, security_from
from expertd.kernels.model.config import InvalidConfig
from expertd.kernels.numerics.quantize import dequantize_activations, quantize_activations
from expertd.kernels.numerics.routing import route, router_logits
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError
from expertd.kernels.weights.files import cache_folder
from expertd.proto.base.errors import ExpertdError

BATCHES = {1: 40, 64: 20, 1024: 8}
"""Tokens of a batch -> timed calls."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """Largest relative errors."""

    layer: float
    """A layer's output, shared expert included, with FP8 activations."""
    routed: float
    """The same for the routed experts alone."""
    exact: float
    """The routed experts with BF16 activations and FP32 replies."""
    beyond: float
    """Of few tokens: what may come on top of what rounding these very tokens to FP8 does to transformers' block."""
    rounds: bool
    """Whether BF16 activations are rounded to FP8, too."""


BOUNDS = {
    "torch": Bounds(3e-2, 4.5e-2, 1e-5, beyond=5e-3, rounds=False),
    "cutile": Bounds(3.6e-2, 5.5e-2, 5.5e-2, beyond=3.5e-2, rounds=True),
}
"""By backend. Rounding to FP8 is 2.6e-2 of the input; it reaches the product of gate and up twice, independently:
sqrt(2) * 2.6e-2 = 3.7e-2. The fast pipeline of cutile rounds that product once more, which makes it 4.5e-2, and also
BF16 activations. Replies in BF16 are 2e-3."""
MANY = 64
"""Tokens over which that is the mean: one token alone may be twice as far off, or half."""
PLAINTEXT = ClientSecurity()
STAGES = ("queue", "compute", "total")
AGREEMENT = ("layer", "tokens", "experts", "layer output", "routed alone", "BF16 in, FP32 out")
LATENCY = ("layer", "tokens", "tokens a server", "queue", "compute", "server", "call")


@dataclass(frozen=True, slots=True)
class Row:
    """What was measured for one batch on one layer."""

    layer: int
    tokens: int
    results: tuple[MoeResult, ...]
    seconds: tuple[float, ...]
    layer_error: float
    routed_error: float
    exact_error: float
    bounds: Bounds
    same_experts: bool

    @property
    def passed(self) -> bool:
        return (
            self.same_experts
            and self.layer_error <= self.bounds.layer
            and self.routed_error <= self.bounds.routed
            and self.exact_error <= self.bounds.exact
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, help="a checkpoint to use instead of the small one that the demo writes")
    parser.add_argument("--layers", type=int, nargs="+", help="layers to run (default: the first two MoE layers)")
    parser.add_argument("--servers", type=int, default=8, help="server processes (default: 8)")
    parser.add_argument("--keep", action="store_true", help="keep the servers running until Ctrl-C")
    parser.add_argument(
        "--connect",
        nargs="+",
        metavar="ADDRESS",
        help=f"use servers that already run, with this --model: {EITHER_PORT}",
    )
    add_security_arguments(parser)
    parser.set_defaults(batches=BATCHES, demo_model=DemoModel())
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="only write the small checkpoint, as FOLDER")


def run(arguments: argparse.Namespace) -> int:
    """0 when every result agrees with transformers, 1 on a mismatch or failure, 2 for wrong options, 130: Ctrl-C."""
    console = Console(highlight=False, soft_wrap=True, width=max(Console().width, 110))
    try:
        with asyncio.Runner() as runner:
            # Like Ctrl-C, so that the servers are stopped before this process ends.
            runner.get_loop().add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)
            return runner.run(demonstrate(arguments, console))
    except KeyboardInterrupt:
        console.print("interrupted; all servers are stopped")
        return 130
    except ExpertdError as error:
        print(f"expertd demo: error: {explained(error, security_from(arguments))}", file=sys.stderr)
        return 1
    except (CheckpointError, InvalidConfig, ServerDied, ValueError) as error:
        print(f"expertd demo: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, ServerDied) else 2


async def demonstrate(arguments: argparse.Namespace, console: Console) -> int:
    """The exit code: 0 when every result agrees with transformers, 1 on a mismatch. Raises what `run` reports."""
    if arguments.write is not None:
        console.print(f"the checkpoint is in {write_checkpoint(arguments.write, arguments.demo_model)}")
        return 0
    if arguments.connect and arguments.model is None:
        raise ValueError("--connect needs --model: the folder of the checkpoint that the servers hold")
    folder = arguments.model or _write_checkpoint(arguments.demo_model, console)
    with Checkpoint(folder) as checkpoint:
        layers = tuple(arguments.layers or checkpoint.config.moe_layers[:2])
        if not arguments.connect:
            return await _start_and_compare(arguments, checkpoint, layers, console)
        addresses = await grpc_addresses(arguments.connect)
        if not await _compare(checkpoint, addresses, layers, arguments.batches, console, security_from(arguments)):
            return 1
        console.print(f"[green]OK[/green]: every result agrees, with {len(arguments.connect)} servers")
        return 0


async def _start_and_compare(
    arguments: argparse.Namespace, checkpoint: Checkpoint, layers: tuple[int, ...], console: Console
) -> int:
    """The same with servers of its own, which must also end well."""
    shards = even_shards(checkpoint.config.n_routed_experts, arguments.servers)
    console.print(f"starting {len(shards)} servers with experts {', '.join(shards)}")
    cluster = LocalCluster(checkpoint.folder, shards, ["--layers", ",".join(map(str, layers)), "--threads", "1"])
    async with contextlib.AsyncExitStack() as stack:
        started = time.perf_counter()
        with console.status("waiting until they are healthy"):
            await stack.enter_async_context(cluster)
        console.print(f"all healthy after {time.perf_counter() - started:.1f} s")
        passed = await _compare(checkpoint, cluster.addresses, layers, arguments.batches, console)
        console.print("metrics of each server while it runs (--keep):")
        for server in cluster.servers:
            console.print(f"  {server.metrics_url}")
        if arguments.keep:
            console.print("the servers run until Ctrl-C")
            await asyncio.Event().wait()
        console.print("stopping the servers")
    if any(cluster.exit_codes):
        console.print(f"[red]FAILED[/red]: server exit codes {cluster.exit_codes}")
        return 1
    if not passed:
        return 1
    console.print(f"[green]OK[/green]: every result agrees; all {len(shards)} servers drained and exited 0")
    return 0


async def _compare(
    checkpoint: Checkpoint,
    addresses: Sequence[str],
    layers: tuple[int, ...],
    batches: Mapping[int, int],
    console: Console,
    security: ClientSecurity = PLAINTEXT,
) -> bool:
    """Measure, show, and tell whether everything agrees."""
    rows = await _measure(checkpoint, addresses, layers, batches, console, security)
    _print_tables(rows, console)
    passed = all(row.passed for row in rows)
    if not passed:
        console.print("[red]FAILED[/red]: results outside their bounds, see the table")
    return passed


def _write_checkpoint(model: DemoModel, console: Console) -> Path:
    folder = cache_folder() / "demo"
    if not (folder / model.name).exists():
        console.print(f"writing a small DeepSeek-V3 checkpoint (0.2 GB) to {folder / model.name}")
    return write_demo_checkpoint(folder, model, lambda layer: console.print(f"  layer {layer} written"))


async def _measure(
    checkpoint: Checkpoint,
    addresses: Sequence[str],
    layers: tuple[int, ...],
    batches: Mapping[int, int],
    console: Console,
    security: ClientSecurity,
) -> list[Row]:
    """Every batch size on every layer; one layer's oracle in memory at a time."""
    gates, source = load_gates(checkpoint, layers), checkpoint.config.family.source
    rows = []
    exact = CoordinatorConfig(
        gates=gates,
        security=security,
        hidden_dtype=torch.bfloat16,
        reply_dtype=torch.float32,
        output_dtype=torch.float32,
    )
    async with (
        Coordinator(addresses, CoordinatorConfig(gates=gates, security=security)) as moe,
        Coordinator(addresses, exact) as exact_moe,
    ):
        for layer in layers:
            with console.status(f"layer {layer}: loading the same experts into transformers' {source}"):
                oracle = await asyncio.to_thread(load_oracle, checkpoint, layer)
            for tokens, calls in batches.items():
                with console.status(f"layer {layer}: {calls} calls of {tokens} tokens"):
                    rows.append(await _measure_batch(moe, exact_moe, gates[layer], oracle, layer, tokens, calls))
                console.print(f"layer {layer}, {tokens} tokens: {'ok' if rows[-1].passed else 'MISMATCH'}")
    return rows


async def _measure_batch(
    moe: Coordinator,
    exact_moe: Coordinator,
    gate: Gate,
    oracle: TransformersOracle,
    layer: int,
    tokens: int,
    calls: int,
) -> Row:
    generator = torch.Generator().manual_seed(layer * 100_003 + tokens)
    hidden = torch.randn(tokens, moe.model.hidden_size, generator=generator).to(torch.bfloat16)
    whole, shared = oracle.layer(hidden), oracle.shared(hidden)
    rounded = oracle.routed(hidden, dequantize_activations(*quantize_activations(hidden)))
    ids, _ = route(router_logits(hidden, gate.weight), gate.correction_bias, moe.model)
    exact = await exact_moe.execute(layer, hidden)
    await moe(layer, hidden)
    results, seconds = [], []
    for _ in range(calls):
        started = time.perf_counter()
        results.append(await moe.execute(layer, hidden))
        seconds.append(time.perf_counter() - started)
    return Row(
        layer=layer,
        tokens=tokens,
        results=tuple(results),
        seconds=tuple(seconds),
        layer_error=relative_error(results[-1].output + shared, whole),
        routed_error=relative_error(results[-1].output, whole - shared),
        exact_error=relative_error(exact.output, whole - shared),
        bounds=_bounds(moe, tokens, relative_error(rounded, whole - shared)),
        same_experts=torch.equal(ids.sort(dim=-1).values.long(), oracle.route(hidden)),
    )


def _bounds(moe: Coordinator, tokens: int, rounding: float) -> Bounds:
    """Those of the least exact backend, for tokens whose rounding to FP8 alone is an error of `rounding`.

    A layer's is for DeepSeek-V3's shared experts: others may have none.
    """
    bounds = max((BOUNDS[backend] for backend in moe.backends), key=lambda bounds: bounds.exact)
    if moe.model.model_type != "deepseek_v3":
        bounds = replace(bounds, layer=bounds.routed)
    if tokens >= MANY:
        return bounds
    least = rounding + bounds.beyond
    exact = max(bounds.exact, least) if bounds.rounds else bounds.exact
    return replace(bounds, layer=max(bounds.layer, least), routed=max(bounds.routed, least), exact=exact)


def _print_tables(rows: list[Row], console: Console) -> None:
    agreement = _table("Relative error against transformers' block", *AGREEMENT)
    latency = _table("Milliseconds, p50 / p99; a stage's is the slowest server's", *LATENCY)
    for row in rows:
        batch = (str(row.layer), str(row.tokens))
        agreement.add_row(
            *batch,
            "same" if row.same_experts else "[red]DIFFER[/red]",
            _verdict(row.layer_error, row.bounds.layer),
            _verdict(row.routed_error, row.bounds.routed),
            _verdict(row.exact_error, row.bounds.exact),
        )
        latency.add_row(
            *batch,
            _spread([server.tokens for server in row.results[-1].servers]),
            *(_quantiles([_slowest(result, stage) for result in row.results]) for stage in STAGES),
            _quantiles(row.seconds),
        )
    console.print(agreement, latency)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _slowest(result: MoeResult, stage: str) -> float:
    return max(float(getattr(server.timings, stage)) for server in result.servers)


def _quantiles(seconds: Sequence[float]) -> str:
    p50, p99 = p50_p99(seconds)
    return f"{p50 * 1e3:.1f} / {p99 * 1e3:.1f}"


def _spread(counts: list[int]) -> str:
    return f"{min(counts)}-{max(counts)} on {len(counts)}"


def _verdict(error: float, bound: float) -> str:
    return f"{error:.1e}" if error <= bound else f"[red]{error:.1e} > {bound:.0e}[/red]"
