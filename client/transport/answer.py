"""What became of a call: the result, or the error, in what came back for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace
from typing import TypeVar, cast

import torch
from torch import Tensor

from expertd import _native
from expertd.client.transport.handover import closed
from expertd.client.transport.native_call import kept
from expertd.kernels.memory.results import empty
from expertd.kernels.numerics.quantize import FP8
from expertd.kernels.numerics.tokens import count_pairs
from expertd.proto import codec
from expertd.proto.base.errors import DeadlineExceeded, ExpertdError, ServerFault
from expertd.proto.codec import ExecuteCall, ExecuteResult, RawResponse, StageTimings

T = TypeVar("T")


async def in_time(address: str, call: ExecuteCall, exchange: Awaitable[T]) -> T:
    """What comes within the call's timeout. Raises `DeadlineExceeded` after it."""
    try:
        async with asyncio.timeout(call.timeout):
            return await exchange
    except DeadlineExceeded:
        raise
    except TimeoutError:
        raise DeadlineExceeded(f"{address}: no answer within {call.timeout} s") from None


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
    response = await in_time(address, call, exchange)
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


def finished(
    address: str, call: ExecuteCall, begun: _native.StraightCall, timeout: float | None, *, checked: bool
) -> ExecuteResult | None:
    """The result of what was begun, waited for at most so many seconds. Raises its error; None without room.

    Partials of FP8 replies come in FP32.
    """
    dtype = torch.float32 if call.reply_dtype == FP8 else call.reply_dtype
    out = None if begun.in_place else empty(call.hidden.shape, dtype)
    # While a thread is here, the server computes.
    receipt = count_pairs(call.expert_ids)
    reports = begun.finish(timeout, out)
    if reports is not None:
        partials = kept(begun, call.hidden.shape, dtype) if out is None else out
        longest = max((report[4] for report in reports), key=sum)
        return ExecuteResult(call.request_id, partials, receipt, StageTimings(*longest))
    sizes = call.hidden.shape[1], call.reply_dtype, call.timeout
    outcomes = [outcome_of(address, part, *sizes, checked=checked) for part in begun.parts()]
    for outcome in outcomes:
        if isinstance(outcome, ExpertdError):
            raise outcome
    if len(outcomes) > 1 and None not in outcomes:
        raise ServerFault(f"{address}: a part's answer is not what was asked for")
    return None if None in outcomes else cast(ExecuteResult, outcomes[0])


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
