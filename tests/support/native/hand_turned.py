"""An engine without a thread, turned by tests, and what it counts."""

import time
from collections.abc import Sequence

import torch

from expertd._native import Answered, Batch, CallbackExecutor, Engine, Inbox, Sampler, Submitted
from expertd.proto import codec
from expertd.proto.codec import ExecuteCall
from expertd.server.telemetry.journal import make_tally
from expertd.server.telemetry.loads import ExpertLoads
from tests.support.native.placements import placement_of

WIDTH, LAYERS, EXPERTS, MAX_QUEUED = 128, (1, 2), (0, 1), 2000


class HandTurned:
    """Open; unless said otherwise it owns experts 0 and 1 of 4, of layers 1 and 2."""

    def __init__(
        self,
        sampler: Sampler | None = None,
        *,
        layers: Sequence[int] = LAYERS,
        experts: Sequence[int] = EXPERTS,
    ) -> None:
        placement = placement_of(experts, layers)
        self.tally = make_tally(ExpertLoads(layers, max(4, len(experts))))
        self.executor = CallbackExecutor(2)
        self.inbox = Inbox()
        self.engine = Engine(
            placement,
            max_batch_tokens=600,
            max_queued_tokens=MAX_QUEUED,
            max_queued_bytes=1 << 30,
            tally=self.tally,
        )
        if sampler is not None:
            self.engine.sample(sampler)
        self.engine.use(self.executor)
        self.engine.open()

    def submit(
        self,
        message: bytes,
        caller: str = "a",
        traceparent: str = "",
        timeout: float | None = None,
        identity: str = "",
    ) -> Submitted:
        return self.inbox.submit(self.engine, message, caller, None, timeout, traceparent, identity=identity)

    def turn(self, now: int | None = None) -> list[Answered]:
        """All there is to do, of threads of the pool too; what was answered by then."""
        deadline = time.monotonic() + 5
        while True:
            handed_out = self.engine.handed_out
            if not self.engine.turn(time.monotonic_ns() if now is None else now) and not handed_out:
                break
            assert time.monotonic() < deadline
        return self.inbox.drain()

    def fetch(self) -> Batch:
        batch = self.executor.fetch()
        assert batch is not None
        return batch

    def answer(self, message: bytes, seconds: Sequence[float] = (0.0, 0.0, 0.0), traceparent: str = "") -> Answered:
        """One request, alone, from its arrival to its answer."""
        copy_in, compute, copy_out = seconds
        self.submit(message, traceparent=traceparent)
        self.turn()
        batch = self.fetch()
        batch.finish(pairs_of(batch), copy_in, compute, copy_out)
        (answered,) = self.turn()
        return answered


def pairs_of(batch: Batch) -> list[int]:
    """What the device is to count of a batch of `message`s."""
    return [batch.tokens, batch.tokens if batch.top_k == 2 else 0]


def message(
    number: int = 1, tokens: int = 1, layer: int = 1, top_k: int = 1, reply_dtype: torch.dtype = torch.float32
) -> bytes:
    """An ExecuteRequest whose tokens all choose expert 0, and 1 too with a `top_k` of 2."""
    call = ExecuteCall(
        request_id=number,
        model_fingerprint="model",
        placement_epoch=None,
        layer=layer,
        hidden=torch.randn(tokens, WIDTH).bfloat16(),
        scales=None,
        expert_ids=torch.arange(top_k, dtype=torch.int32).repeat(tokens, 1),
        weights=torch.rand(tokens, top_k),
        reply_dtype=reply_dtype,
    )
    return codec.encode_call(call)
