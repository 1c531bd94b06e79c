"""Servers asked what they own, all at once."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence

from expertd.client.fleet.member import Member
from expertd.proto.base.errors import ExpertdError, Unavailable

GRACE_SECONDS = 0.2
"""For servers that are not needed, once what others own suffices; and as long again as those took."""


async def ask(members: Sequence[Member], timeout: float, suffices: Callable[[], bool]) -> None:
    """Have members tell their shards, or why not: all, or as many as suffice and who is not much slower."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    asked = {asyncio.ensure_future(member.transport.get_shard(timeout)): member for member in members}
    waiting, patience = set(asked), math.inf
    try:
        while waiting and loop.time() < patience:
            left = None if math.isinf(patience) else patience - loop.time()
            done, waiting = await asyncio.wait(waiting, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for answer in done:
                member, error = asked[answer], answer.exception()
                if isinstance(error, ExpertdError):
                    member.why_not = error
                elif error is not None:
                    raise error
                else:
                    member.shard = answer.result()
            if math.isinf(patience) and suffices():
                patience = 2 * loop.time() - began + GRACE_SECONDS
    finally:
        for answer in waiting:
            asked[answer].why_not = Unavailable(f"{asked[answer].transport.address}: no answer so far")
            answer.cancel()
