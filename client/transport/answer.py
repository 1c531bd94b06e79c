"""What became of a call: the result, or the error, in what came back for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import replace

from torch import Tensor

from expertd.proto import codec
from expertd.proto.base.errors import DeadlineExceeded, ExpertdError
from expertd.proto.codec import ExecuteCall, ExecuteResult, RawResponse


async def answer(
    address: str, call: ExecuteCall, exchange: Awaitable[RawResponse], shared: Tensor | None = None
) -> ExecuteResult:
    """What came back for `call`, its partials in the response or in `shared` [n] uint8; they go where its tensors are.

    Raises the error in it, or `DeadlineExceeded` after the call's timeout.
    """
    tokens, width = call.hidden.shape
    try:
        async with asyncio.timeout(call.timeout):
            response = await exchange
    except TimeoutError:
        raise DeadlineExceeded(f"{address}: no answer within {call.timeout} s") from None
    try:
        result = codec.decode_result(response, tokens, width, call.reply_dtype, shared)
    except ExpertdError as error:
        raise error.again(f"{address}: ") from None
    return replace(result, partials=result.partials.to(call.hidden.device)) if call.hidden.is_cuda else result
