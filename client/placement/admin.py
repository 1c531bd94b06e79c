"""A server's administration, as who moves experts or rolls out weights calls it."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import sys
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import grpc.aio
from google.protobuf.message import Message

from expertd.client.fleet.ports import explained
from expertd.client.transport.security import ClientSecurity, add_security_arguments, security_from
from expertd.proto.base.errors import ExpertdError, error_from_status
from expertd.proto.codec.admin import (
    ADMIN,
    DeviceExperts,
    LayerExperts,
    ReleaseRequest,
    ShareRequest,
    UpdateDone,
    UpdateRequest,
    UpdateResponse,
    WeightsRequest,
)

Telling: TypeAlias = AsyncGenerator[UpdateResponse, None]


def add_admin_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `add_security_arguments`, and the administrator's token."""
    add_security_arguments(parser)
    parser.add_argument(
        "--admin-token-file", type=Path, metavar="FILE", help="first line: a token of the servers' --admin-token-file"
    )


def admin_security_from(arguments: argparse.Namespace) -> ClientSecurity:
    """What servers' administration is called with. Raises what `security_from` does."""
    return replace(security_from(arguments), token_file=arguments.admin_token_file)


def exit_code(name: str, work: Coroutine[Any, Any, None], arguments: argparse.Namespace) -> int:
    """Of the command `name`, which does `work`: 0 when all went well, 1 when servers refused, 2 for unusable options or
    a fleet that this is not for, with a line of why."""
    try:
        asyncio.run(work)
    except ExpertdError as error:
        print(f"expertd {name}: error: {explained(error, security_from(arguments))}", file=sys.stderr)
        return 1
    except (OSError, ValueError) as error:
        print(f"expertd {name}: error: {error}", file=sys.stderr)
        return 2
    return 0


def update_shard(
    address: str,
    security: ClientSecurity,
    epoch: int,
    experts: Mapping[int, Sequence[int]],
    devices: Mapping[int, Mapping[int, Sequence[int]]] | None = None,
) -> Telling:
    """Have the server with this --admin-listen own `experts` of these layers, if its placement is that of `epoch`.

    `devices` says of layers which of them each device is to have, by its number; of others the server decides. Tells
    its progress; the last one has `done`. When it is closed before that, or raises what the server answers, the server
    owns what it owned.
    """
    chosen = {
        layer: [DeviceExperts(number=number, experts=its) for number, its in parts.items()]
        for layer, parts in (devices or {}).items()
    }
    layers = [LayerExperts(layer=layer, experts=experts[layer], devices=chosen.get(layer)) for layer in sorted(experts)]
    return _stream(address, security, "UpdateShard", UpdateRequest(placement_epoch=epoch, layers=layers))


def update_weights(address: str, security: ClientSecurity, epoch: int, folder: str, fingerprint: str = "") -> Telling:
    """Have the server take the weights in its `folder` as the next generation; otherwise like `update_shard`.

    `fingerprint` is what theirs must be; empty: any.
    """
    request = WeightsRequest(placement_epoch=epoch, folder=folder, model_fingerprint=fingerprint)
    return _stream(address, security, "UpdateWeights", request)


async def share_calls(address: str, security: ClientSecurity, epoch: int, fingerprint: str, share: float) -> UpdateDone:
    """Have this share of calls use the next generation, which has this fingerprint. Raises what the server answers."""
    request = ShareRequest(placement_epoch=epoch, model_fingerprint=fingerprint, share=share)
    return await _call(address, security, "ShareCalls", request)


async def release_weights(address: str, security: ClientSecurity, epoch: int, fingerprint: str) -> UpdateDone:
    """Have the server free the weights of a generation. Raises what the server answers."""
    request = ReleaseRequest(placement_epoch=epoch, model_fingerprint=fingerprint)
    return await _call(address, security, "ReleaseWeights", request)


async def _stream(address: str, security: ClientSecurity, method: str, request: Message) -> Telling:
    async with contextlib.AsyncExitStack() as stack:
        channel = await stack.enter_async_context(security.open_channel(address, []))
        asked: Any = channel.unary_stream(
            f"/{ADMIN}/{method}", type(request).SerializeToString, UpdateResponse.FromString
        )
        call = asked(request, metadata=security.metadata())
        stack.callback(call.cancel)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise error_from_status(error.code(), error.details() or "") from None


async def _call(address: str, security: ClientSecurity, method: str, request: Message) -> UpdateDone:
    async with security.open_channel(address, []) as channel:
        asked: Any = channel.unary_unary(f"/{ADMIN}/{method}", type(request).SerializeToString, UpdateDone.FromString)
        try:
            done: UpdateDone = await asked(request, metadata=security.metadata())
        except grpc.aio.AioRpcError as error:
            raise error_from_status(error.code(), error.details() or "") from None
        return done
