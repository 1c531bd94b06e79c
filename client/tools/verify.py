"""`expertd verify`: golden batches through running servers, compared with an FP32 reference from the checkpoint."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from expertd.client.fleet.ports import EITHER_PORT, explained, grpc_addresses
from expertd.client.tools.verify_report import Report, as_json, print_report
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.security import ClientSecurity, add_security_arguments, security_from
from expertd.kernels.model.config import InvalidConfig
from expertd.kernels.model.ranges import describe_experts, format_ranges, parse_ranges
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.numerics.quantize import FP8, dequantize_activations
from expertd.kernels.oracle.golden import BOUNDS, Agreement, Bounds
from expertd.kernels.oracle.verification import verify
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError
from expertd.kernels.weights.ledger import Ledger
from expertd.kernels.weights.manifest import MANIFEST
from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError, ModelMismatch, UnknownExpert, error_from_status
from expertd.proto.codec import ExecuteCall, ShardInfo

CONNECT_SECONDS = 10.0
CALL_SECONDS = 60.0
REPLIES = {"float32": torch.float32, "float8_e4m3fn": FP8}


@dataclass(frozen=True, slots=True)
class Scope:
    """What to verify, and how; None: all that a server owns."""

    layers: tuple[int, ...] | None
    experts: tuple[int, ...] | None
    seed: int
    reply_dtype: torch.dtype
    """Of what servers answer to a caller that compares by itself."""

    def bounds(self, backend: str) -> Bounds:
        bounds = BOUNDS[backend]
        return bounds.rounded() if self.reply_dtype == FP8 else bounds

    def of(self, address: str, shard: ShardInfo) -> dict[int, tuple[int, ...]]:
        """By layer, of those that the server owns. Raises `UnknownExpert` when none are left."""
        chosen = {
            layer: tuple(expert for expert in owned if self.experts is None or expert in self.experts)
            for layer, owned in shard.experts.items()
            if self.layers is None or layer in self.layers
        }
        chosen = {layer: experts for layer, experts in chosen.items() if experts}
        if not chosen:
            raise UnknownExpert(
                f"{address} owns layers {format_ranges(shard.layers)} and experts {describe_experts(shard.experts)};"
                " none of them was asked for"
            )
        return chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "servers", nargs="+", metavar="ADDRESS", help=f"servers to verify, one after another: {EITHER_PORT}"
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="folder of the checkpoint; without it each server reads its own and compares by itself",
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        help=f"manifest of the checkpoint (default: {MANIFEST} in its folder, if it is there)",
    )
    parser.add_argument("--layers", type=_ranges, help="layers to verify, such as 3-5,60 (default: all)")
    parser.add_argument("--experts", type=_ranges, help="experts to verify, such as 0-3 (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="other tokens for another seed (default: 0)")
    parser.add_argument(
        "--reply-dtype",
        choices=REPLIES,
        default="float32",
        help="what servers are to answer, with --model: float8_e4m3fn has wider bounds (default: float32)",
    )
    parser.add_argument("--json", action="store_true", help="print every comparison as JSON")
    add_security_arguments(parser)


def _ranges(text: str) -> tuple[int, ...]:
    try:
        return parse_ranges(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def run(arguments: argparse.Namespace) -> int:
    """0 when all is within its bounds, 1 when something is not, 2 when it could not be found out, 130 after Ctrl-C."""
    try:
        security = security_from(arguments)
        reply_dtype = REPLIES[arguments.reply_dtype]
        if arguments.model is None and reply_dtype != torch.float32:
            raise ValueError("--reply-dtype needs --model: a server that compares itself does so before it answers")
        scope = Scope(arguments.layers, arguments.experts, arguments.seed, reply_dtype)
        reports = asyncio.run(_verify_all(arguments.servers, arguments.model, arguments.manifest, scope, security))
    except KeyboardInterrupt:
        return 130
    except ExpertdError as error:
        print(f"expertd verify: error: {explained(error, security)}", file=sys.stderr)
        return 2
    except (CheckpointError, InvalidConfig, OSError, ValueError) as error:
        print(f"expertd verify: error: {error}", file=sys.stderr)
        return 2
    if arguments.json:
        print(json.dumps(as_json(reports), indent=1))
    else:
        console = Console(highlight=False, width=max(Console().width, 120))
        for report in reports:
            print_report(report, console)
    return 0 if all(report.passed for report in reports) else 1


async def _verify_all(
    servers: Sequence[str], model: Path | None, manifest: Path | None, scope: Scope, security: ClientSecurity
) -> list[Report]:
    with contextlib.ExitStack() as stack:
        with Console(stderr=True).status("looking at the checkpoint"):
            ledger = None if model is None else Ledger(stack.enter_context(Checkpoint(model)), manifest)
        bar = stack.enter_context(Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()))
        addresses = await grpc_addresses(servers)
        return [await _verify_server(address, ledger, scope, security, bar) for address in addresses]


async def _verify_server(
    address: str, ledger: Ledger | None, scope: Scope, security: ClientSecurity, bar: Progress
) -> Report:
    transport = GrpcTransport(address, security=security)
    task = bar.add_task(address, total=None)
    try:
        shard = await transport.get_shard(CONNECT_SECONDS)
        chosen = scope.of(address, shard)
        if ledger is None:
            agreements = ask_server(address, chosen, scope.seed, security)
        else:
            agreements = replay(transport, shard, ledger, chosen, scope)
        bar.update(task, total=sum(len(experts) + 1 for experts in chosen.values()))
        found = []
        async with contextlib.aclosing(agreements):
            async for agreement in agreements:
                found.append(agreement)
                bar.advance(task)
    finally:
        await transport.close()
    return Report(address, shard, scope.bounds(shard.backend), tuple(found))


def replay(
    transport: GrpcTransport,
    shard: ShardInfo,
    ledger: Ledger,
    experts: Mapping[int, Sequence[int]],
    scope: Scope,
) -> AsyncGenerator[Agreement, None]:
    """Send golden batches to a server and compare with the reference from `ledger`'s checkpoint, which is read here.

    Raises `ModelMismatch` when the server serves another model, else what it answers.
    """
    if shard.model_fingerprint != ledger.fingerprint:
        raise ModelMismatch(
            f"{transport.address} holds model {shard.model_fingerprint!r}, but {ledger.checkpoint.folder} is {ledger};"
            " give --model the folder that the server was started with, and --manifest if it has one from elsewhere"
        )

    async def compute(layer: int, batch: TokenBatch) -> Tensor:
        call = ExecuteCall(
            request_id=1,
            model_fingerprint=shard.model_fingerprint,
            placement_epoch=shard.placement_epoch,
            layer=layer,
            hidden=batch.hidden,
            scales=batch.scales,
            expert_ids=batch.expert_ids,
            weights=batch.weights,
            reply_dtype=scope.reply_dtype,
            timeout=CALL_SECONDS,
        )
        result = await transport.execute(call)
        return result.partials if result.scales is None else dequantize_activations(result.partials, result.scales)

    return verify(
        ledger.checkpoint,
        experts,
        scope.seed,
        shard.max_tokens_per_request,
        compute,
        shard.weight_dtype,
    )


async def ask_server(
    address: str, experts: Mapping[int, Sequence[int]], seed: int, security: ClientSecurity
) -> AsyncGenerator[Agreement, None]:
    """Let the server compare itself with its own checkpoint. Raises what it answers."""
    async with security.open_channel(address, options=[]) as channel:
        method: grpc.aio.UnaryStreamMultiCallable[Any, Any] = channel.unary_stream(
            f"/{codec.SERVICE}/VerifyShard", codec.VerifyRequest.SerializeToString, codec.VerifyResponse.FromString
        )
        request = codec.VerifyRequest(layers=list(experts), experts=sorted(set().union(*experts.values())), seed=seed)
        try:
            async for response in method(request, metadata=security.metadata()):
                yield Agreement(**codec.decode_report(response))  # type: ignore[arg-type]
        except grpc.aio.AioRpcError as error:
            raise error_from_status(error.code(), f"{address}: {error.details()}") from None
