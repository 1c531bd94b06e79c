"""`expertd verify`: golden batches through running servers, compared with an FP32 reference from the checkpoint."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc.aio
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from expertd.client.tools.verify_report import Report, as_json, print_report
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.security import ClientSecurity, add_tls_arguments, security_from
from expertd.kernels.model.config import InvalidConfig
from expertd.kernels.model.ranges import format_ranges, parse_ranges
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.oracle.golden import BOUNDS, Agreement
from expertd.kernels.oracle.verification import verify
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError
from expertd.kernels.weights.ledger import Ledger
from expertd.kernels.weights.manifest import MANIFEST
from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError, ModelMismatch, UnknownExpert, error_from_status
from expertd.proto.codec import ExecuteCall, ShardInfo

CONNECT_SECONDS = 10.0
CALL_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Scope:
    """What to verify; None: all that a server owns."""

    layers: tuple[int, ...] | None
    experts: tuple[int, ...] | None
    seed: int

    def of(self, address: str, shard: ShardInfo) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Layers and experts, of those that the server owns. Raises `UnknownExpert` when none are left."""
        layers = tuple(layer for layer in shard.layers if self.layers is None or layer in self.layers)
        experts = tuple(expert for expert in shard.experts if self.experts is None or expert in self.experts)
        if not (layers and experts):
            raise UnknownExpert(
                f"{address} owns layers {format_ranges(shard.layers)} and experts {format_ranges(shard.experts)};"
                " none of them was asked for"
            )
        return layers, experts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("servers", nargs="+", metavar="HOST:PORT", help="servers to verify, one after another")
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
    parser.add_argument("--layers", type=parse_ranges, help="layers to verify, such as 3-5,60 (default: all)")
    parser.add_argument("--experts", type=parse_ranges, help="experts to verify, such as 0-3 (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="other tokens for another seed (default: 0)")
    parser.add_argument("--json", action="store_true", help="print every comparison as JSON")
    add_tls_arguments(parser)
    parser.add_argument("--auth-token-file", type=Path, help="file whose first line is a bearer token")


def run(arguments: argparse.Namespace) -> int:
    """0 when all is within its bounds, 1 when something is not, 2 when it could not be found out, 130 after Ctrl-C."""
    try:
        security = replace(security_from(arguments), token_file=arguments.auth_token_file)
        scope = Scope(arguments.layers, arguments.experts, arguments.seed)
        reports = asyncio.run(_verify_all(arguments.servers, arguments.model, arguments.manifest, scope, security))
    except KeyboardInterrupt:
        return 130
    except (CheckpointError, ExpertdError, InvalidConfig, OSError, ValueError) as error:
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
        ledger = None if model is None else Ledger(stack.enter_context(Checkpoint(model)), manifest)
        bar = stack.enter_context(Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()))
        return [await _verify_server(address, ledger, scope, security, bar) for address in servers]


async def _verify_server(
    address: str, ledger: Ledger | None, scope: Scope, security: ClientSecurity, bar: Progress
) -> Report:
    transport = GrpcTransport(address, security=security)
    try:
        shard = await transport.get_shard(CONNECT_SECONDS)
        layers, experts = scope.of(address, shard)
        if ledger is None:
            agreements = ask_server(address, layers, experts, scope.seed, security)
        else:
            agreements = replay(transport, shard, ledger, layers, experts, scope.seed)
        task = bar.add_task(address, total=len(layers) * (len(experts) + 1))
        found = []
        async with contextlib.aclosing(agreements):
            async for agreement in agreements:
                found.append(agreement)
                bar.advance(task)
    finally:
        await transport.close()
    return Report(address, shard, BOUNDS[shard.backend], tuple(found))


def replay(
    transport: GrpcTransport,
    shard: ShardInfo,
    ledger: Ledger,
    layers: Sequence[int],
    experts: Sequence[int],
    seed: int,
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
            reply_dtype=torch.float32,
            timeout=CALL_SECONDS,
        )
        return (await transport.execute(call)).partials

    return verify(ledger.checkpoint, layers, experts, seed, shard.max_tokens_per_request, compute)


async def ask_server(
    address: str, layers: Sequence[int], experts: Sequence[int], seed: int, security: ClientSecurity
) -> AsyncGenerator[Agreement, None]:
    """Let the server compare itself with its own checkpoint. Raises what it answers."""
    async with security.open_channel(address, options=[]) as channel:
        method: grpc.aio.UnaryStreamMultiCallable[Any, Any] = channel.unary_stream(
            f"/{codec.SERVICE}/VerifyShard", codec.VerifyRequest.SerializeToString, codec.VerifyResponse.FromString
        )
        request = codec.VerifyRequest(layers=layers, experts=experts, seed=seed)
        try:
            async for response in method(request, metadata=security.metadata()):
                yield Agreement(**codec.decode_report(response))  # type: ignore[arg-type]
        except grpc.aio.AioRpcError as error:
            raise error_from_status(error.code(), f"{address}: {error.details()}") from None
