"""Requests to one server whatever becomes of them: as many as it can take, or many times as many."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import Counter
from collections.abc import Sequence

import torch

from expertd.client.transport.interface import Transport
from expertd.kernels.oracle.reference import relative_error
from expertd.proto.base.errors import ExpertdError
from expertd.proto.codec import ExecuteCall, ShardInfo
from tests.chaos.load import Case, is_right
from tests.support.fence.wrong import wrong


class Offers:
    """Requests over some connections and for some cases, each in turn, and what became of them."""

    def __init__(self, transports: Sequence[Transport], shard: ShardInfo, cases: Sequence[Case]) -> None:
        self._turns = zip(itertools.cycle(transports), itertools.cycle(cases), itertools.count(1), strict=False)
        self._shard = shard
        self.outcomes: Counter[str] = Counter()
        self.wrong = 0

    async def send(self) -> None:
        transport, case, number = next(self._turns)
        call = ExecuteCall(
            request_id=number,
            model_fingerprint=self._shard.model_fingerprint,
            placement_epoch=self._shard.placement_epoch,
            layer=case.layer,
            hidden=case.hidden,
            scales=None,
            expert_ids=case.ids.int(),
            weights=case.weights,
            reply_dtype=torch.float32,
            timeout=30.0,
        )
        try:
            result = await transport.execute(call)
        except ExpertdError as error:
            self.outcomes[type(error).__name__] += 1
        else:
            self.outcomes["ok"] += 1
            off = relative_error(result.partials, case.right)
            if not is_right(off):
                self.wrong += 1
                wrong(f"layer {case.layer}, {len(case.ids)} tokens: error {off:.2e}")

    async def peak(self, seconds: float, callers: int = 6) -> float:
        """Answers a second, with so many requests at once: choose as many as the server's queue takes."""
        before, started = self.outcomes["ok"], time.monotonic()

        async def caller() -> None:
            while time.monotonic() - started < seconds:
                await self.send()

        await asyncio.gather(*(caller() for _ in range(callers)))
        return (self.outcomes["ok"] - before) / (time.monotonic() - started)

    async def flood(self, rate: float, seconds: float) -> float:
        """Send `rate` requests a second whatever becomes of them; the answers a second."""
        before, started = self.outcomes["ok"], time.monotonic()
        async with asyncio.TaskGroup() as group:
            for number in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, started + number / rate - time.monotonic()))
                group.create_task(self.send())
            answered = self.outcomes["ok"] - before
            elapsed = time.monotonic() - started
        return answered / elapsed
