"""What answers `Execute` on this server: decode, compute, encode."""

from __future__ import annotations

import logging
import time

import torch

from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError, ServerFault
from expertd.proto.codec import ExecuteResult, ShardInfo, StageTimings
from expertd.server.rpc.incoming import Incoming
from expertd.server.scheduling.batching import Scheduler
from expertd.server.scheduling.shadow import ShadowCheck
from expertd.server.scheduling.shard import Shard
from expertd.server.telemetry.journal import Journal

log = logging.getLogger(__name__)


class ShardExecutor:
    """Computes requests on the experts of one shard."""

    def __init__(
        self, shard: Shard, info: ShardInfo, scheduler: Scheduler, shadow: ShadowCheck | None, journal: Journal
    ) -> None:
        """`info` is what callers are told of `shard`."""
        self.shard = shard
        self.info = info
        self._scheduler = scheduler
        self._shadow = shadow
        self._journal = journal

    async def answer(self, incoming: Incoming) -> bytes:
        """Compute one request; every outcome is recorded."""
        with self._journal.request(incoming.request, incoming.caller):
            try:
                return await self._compute(incoming)
            except ExpertdError:
                raise
            except Exception as error:
                log.exception("request %d failed", incoming.request.request_id)
                raise ServerFault(f"{type(error).__name__}: {error}") from error

    async def _compute(self, incoming: Incoming) -> bytes:
        arrived = time.perf_counter()
        request, caller, most = incoming.request, incoming.caller, self.info.max_tokens_per_request
        # Before anything is read of the tensors: a server with too much to do has no time for what it will refuse.
        self._scheduler.check_room(min(request.num_tokens, most), request.num_tensor_bytes)
        config = self.shard.config
        call = codec.decode_call(request, config.hidden_size, config.num_experts_per_tok, most, incoming.segment)
        batch = self.shard.admit(call)
        decoded = time.perf_counter()
        timeout = min((limit for limit in (call.timeout, incoming.time_remaining) if limit is not None), default=None)
        done = await self._scheduler.execute(caller, call.layer, batch, call.reply_dtype, timeout)
        computed = time.perf_counter()
        timings = StageTimings(decoded - arrived, done.waited, *done.seconds)
        pairs = done.partials.pairs.numpy()
        receipt = {expert: count for expert, count in zip(self.shard.experts, pairs.tolist(), strict=True) if count}
        sums = done.partials.sums if call.reply_into is None else torch.empty(0, dtype=call.reply_dtype)
        response = codec.encode_result(ExecuteResult(call.request_id, sums, receipt, timings))
        if self._shadow is not None:
            self._shadow.offer(call.layer, batch, done.partials.sums)
        encoded = time.perf_counter()
        self._journal.answered(call, caller, pairs, timings, encoded - computed, encoded - arrived)
        return response
