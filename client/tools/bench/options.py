"""What `expertd bench serve` can be asked for, and which of it goes together."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.fleet.ports import EITHER_PORT
from expertd.client.transport.security import add_security_arguments

TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)
BATCHES = (64, 256, 1024)
CALLERS = (1, 4, 16, 64)
TRANSPORTS = ("grpc", "unix", "shm", "cuda", "stream")


class BenchError(Exception):
    """What was asked for cannot be measured here."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    config = CoordinatorConfig()
    parser.add_argument(
        "--servers", nargs="+", metavar="ADDRESS", help=f"running servers: {EITHER_PORT} (default: one of its own)"
    )
    parser.add_argument(
        "--servers-of-its-own",
        type=int,
        metavar="N",
        help="start so many that share the experts, and measure one token that 1, 4 and 8 of them compute",
    )
    parser.add_argument(
        "--layers", action="store_true", help="measure one token through all layers, one after another, instead"
    )
    parser.add_argument(
        "--micro-batches",
        action="store_true",
        help="measure what two halves of a batch overlap with what the caller computes, instead",
    )
    parser.add_argument(
        "--caller-ms",
        type=float,
        metavar="MS",
        help="with --micro-batches: what the caller computes for each half (default: as long as a half's call takes)",
    )
    parser.add_argument(
        "--transport",
        nargs="+",
        choices=TRANSPORTS,
        help="gRPC, gRPC over a unix socket (one server of its own only), shared memory, memory of the server's GPU,"
        " stream-ordered calls from the GPU of this process (one caller; default: all that there are)",
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", help=f"batch sizes (default: {TOKENS}; with --micro-batches {BATCHES})"
    )
    parser.add_argument("--callers", type=int, nargs="+", help=f"callers (default: {CALLERS})")
    parser.add_argument(
        "--no-experts",
        action="store_true",
        help="calls that want no expert, straight through the transport: what moving the bytes costs; one caller, one"
        " server",
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each measurement (default: 2)")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="of its own servers (default: one that it writes)")
    parser.add_argument(
        "--hidden-size",
        type=int,
        help="of the model that it writes (default: 7168; 512 with several layers)",
    )
    parser.add_argument("--intermediate-size", type=int, help="likewise (default: 2048; 256)")
    parser.add_argument("--backend", default="auto", help="of its own servers (default: auto)")
    parser.add_argument("--devices", metavar="RANGES", help="of its own server, which has all of them (default: one)")
    parser.add_argument("--channels", type=int, default=config.channels, help="connections to a server")
    parser.add_argument("--chunk-bytes", type=int, default=config.chunk_bytes, help="largest gRPC message")
    parser.add_argument(
        "--shared-memory-chunk-bytes",
        type=int,
        default=config.shared_memory_chunk_bytes,
        help="largest call through shared memory",
    )
    add_security_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG to draw them to; needs the extra 'plot'")


def check(arguments: argparse.Namespace) -> None:
    """Raise `BenchError` for the first thing that cannot be had, or not with another."""
    for obstacle in _obstacles(arguments):
        raise BenchError(obstacle)


def sections_of(arguments: argparse.Namespace) -> list[str]:
    """The options that measure something else than calls of many sizes."""
    wanted = {
        "--layers": arguments.layers,
        "--servers-of-its-own": arguments.servers_of_its_own is not None,
        "--micro-batches": arguments.micro_batches,
    }
    return [option for option, chosen in wanted.items() if chosen]


def measures_calls(arguments: argparse.Namespace) -> bool:
    """Whether calls of many sizes are measured, through coordinators."""
    return not arguments.no_experts and not sections_of(arguments)


def _obstacles(arguments: argparse.Namespace) -> Iterator[str]:
    if arguments.plot is not None and importlib.util.find_spec("matplotlib") is None:
        yield "--plot needs matplotlib, which is not installed; pip install 'expertd[plot]'"
    for option, numbers in (("--tokens", arguments.tokens), ("--callers", arguments.callers)):
        if min(numbers or [1]) < 1:
            yield f"{option} {min(numbers)}: there must be one at least"
    if arguments.seconds <= 0:
        yield f"--seconds {arguments.seconds:g}: there must be some"
    for option in ("hidden_size", "intermediate_size"):
        if (getattr(arguments, option) or 128) % 128:
            yield f"{_spelt(option)} {getattr(arguments, option)}: weights are in blocks of 128"
    if arguments.no_experts and (arguments.callers or len(arguments.servers or ()) > 1):
        yield "--no-experts is for one caller, without --callers, and one server"
    if arguments.servers is not None:
        for option in ("servers_of_its_own", "model", "hidden_size", "intermediate_size", "devices"):
            if getattr(arguments, option) is not None:
                yield f"{_spelt(option)} is for servers of its own, not for --servers"
    if arguments.model is not None and (arguments.hidden_size or arguments.intermediate_size):
        yield "--hidden-size and --intermediate-size are of a checkpoint that it writes, not for --model"
    if "stream" in (arguments.transport or ()) and not measures_calls(arguments):
        option = "--no-experts" if arguments.no_experts else sections_of(arguments)[0]
        yield f"--transport stream measures calls of many sizes and does not go with {option}"
    yield from _obstacles_of_sections(arguments)


def _obstacles_of_sections(arguments: argparse.Namespace) -> Iterator[str]:
    servers = arguments.servers_of_its_own
    if servers is not None and servers < 2:
        yield f"--servers-of-its-own {servers}: there must be two at least, one is the default"
    if servers is not None and arguments.devices is not None:
        yield "--devices is of one server of its own, not for --servers-of-its-own"
    if servers is not None and "unix" in (arguments.transport or ()):
        yield "--transport unix is of one server of its own, not for --servers-of-its-own"
    for section in sections_of(arguments):
        if arguments.no_experts or arguments.callers:
            yield f"{section} does not go with {'--no-experts' if arguments.no_experts else '--callers'}"
        if arguments.tokens and not arguments.micro_batches:
            yield f"{section} measures calls of one token and does not go with --tokens"
    if arguments.caller_ms is not None and not (arguments.micro_batches and arguments.caller_ms > 0):
        yield "--caller-ms needs --micro-batches and more than nothing"
    odd = [tokens for tokens in arguments.tokens or () if tokens % 2]
    if arguments.micro_batches and odd:
        yield f"--micro-batches halves batches; --tokens {odd[0]} is odd"


def _spelt(name: str) -> str:
    return f"--{name.replace('_', '-')}"
