"""What became of a call: the result, or the error, in what came back for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace

import torch
from torch import Tensor

from expertd import _native
from expertd.client.transport.handover import closed
from expertd.proto import codec
from expertd.proto.base.errors import DeadlineExceeded, ExpertdError, ServerFault
from expertd.proto.codec import ExecuteCall, ExecuteResult, RawResponse


async def answer(
    address: str,
    call: ExecuteCall,
    exchange: Awaitable[RawResponse],
    shared: Tensor | None = None,
    *,
    checked: bool = False,
) -> ExecuteResult:
    """What came back for `call`, its partials in the response or in `shared` [n] uint8; they go where its tensors are.

    `checked`: whether it was sent with checksums.

    Raises the error in it, or `DeadlineExceeded` after the call's timeout.
    """
    try:
        async with asyncio.timeout(call.timeout):
            response = await exchange
    except DeadlineExceeded:
        raise
    except TimeoutError:
        raise DeadlineExceeded(f"{address}: no answer within {call.timeout} s") from None
    tokens, width = call.hidden.shape
    try:
        result = codec.decode_result(response, tokens, width, call.reply_dtype, shared, checked=checked)
    except ExpertdError as error:
        raise error.again(f"{address}: ") from None
    if not call.hidden.is_cuda:
        return result
    device = call.hidden.device
    scales = None if result.scales is None else result.scales.to(device)
    return replace(result, partials=result.partials.to(device), scales=scales)


def outcome_of(
    address: str, part: _native.CallPart, width: int, dtype: torch.dtype, timeout: float | None, *, checked: bool
) -> ExecuteResult | ExpertdError | None:
    """What became of a part of a call that went the straight way; None when it was never sent."""
    _, tokens, _, _, state, reply, sums, _, request_id = part
    match state:
        case _native.PartState.FULL:
            return None
        case _native.PartState.ENDED:
            return closed(address)
        case _native.PartState.POSTED:
            return DeadlineExceeded(f"{address}: no answer within {timeout} s")
    try:
        shared = torch.frombuffer(bytearray(sums), dtype=torch.uint8) if sums else None
        response, count = codec.parse_response(reply), len(tokens) // 8
        result = codec.decode_result(response, count, width, dtype, shared, checked=checked)
        if result.request_id != request_id:
            raise ServerFault(f"the answer is to request {result.request_id}; request {request_id} was sent")
        return result
    except ExpertdError as error:
        return error.again(f"{address}: ")
