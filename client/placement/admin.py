"""A server's administration, as who moves experts calls it."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

import grpc.aio

from expertd.client.transport.security import ClientSecurity
from expertd.proto.base.errors import error_from_status
from expertd.proto.codec.admin import ADMIN, LayerExperts, UpdateRequest, UpdateResponse


async def update_shard(
    address: str, security: ClientSecurity, epoch: int, experts: Mapping[int, Sequence[int]]
) -> AsyncGenerator[UpdateResponse, None]:
    """Have the server with this --admin-listen own `experts` of these layers, if its placement is that of `epoch`.

    Tells its progress; the last one has `done`. When it is closed before that, or raises what the server answers, the
    server owns what it owned.
    """
    layers = [LayerExperts(layer=layer, experts=owned) for layer, owned in experts.items()]
    async with contextlib.AsyncExitStack() as stack:
        channel = await stack.enter_async_context(security.open_channel(address, []))
        method: Any = channel.unary_stream(
            f"/{ADMIN}/UpdateShard", UpdateRequest.SerializeToString, UpdateResponse.FromString
        )
        call = method(UpdateRequest(placement_epoch=epoch, layers=layers), metadata=security.metadata())
        stack.callback(call.cancel)
        try:
            async for response in call:
                yield response
        except grpc.aio.AioRpcError as error:
            raise error_from_status(error.code(), error.details() or "") from None
