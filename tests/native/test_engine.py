"""The engine's order, bounds, cancellations and endings, against the Python queue as a model, one turn at a time."""

import random
import select
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd.kernels.numerics.backend import TokenBatch
from expertd.proto import codec
from expertd.proto.base.errors import Overloaded
from expertd.proto.codec import ExecuteCall
from expertd.server.scheduling.admission import Admission
from expertd.server.scheduling.batching import may_start
from expertd.server.scheduling.queue import FairQueue, Job
from tests.support.native_build import build_engine_extension

NATIVE: Any = build_engine_extension(Path(tempfile.mkdtemp(prefix="engine-")))
WIDTH, MAX_BATCH, MAX_QUEUED, MAX_BYTES, DEPTH = 128, 600, 2000, 300_000, 2
SIZES = (1, 1, 2, 5, 100, 255, 256, 300, 700)


def placement(epoch: int = 1) -> Any:  # noqa: ANN401
    return NATIVE.Placement(
        model_fingerprint="model",
        epoch=epoch,
        layers=(1, 2),
        layers_text="1-2",
        experts=(0, 1),
        experts_text="0-1",
        num_routed_experts=4,
        hidden_size=WIDTH,
        max_top_k=2,
        max_tokens=1000,
    )


def make_engine() -> Any:  # noqa: ANN401
    engine = NATIVE.Engine(
        placement(), max_batch_tokens=MAX_BATCH, max_queued_tokens=MAX_QUEUED, max_queued_bytes=MAX_BYTES, depth=DEPTH
    )
    engine.open()
    return engine


def call(number: int, tokens: int, layer: int = 1, reply: torch.dtype = torch.float32, top_k: int = 1) -> ExecuteCall:
    return ExecuteCall(
        request_id=number,
        model_fingerprint="model",
        placement_epoch=None,
        layer=layer,
        hidden=torch.zeros(tokens, WIDTH, dtype=torch.bfloat16),
        scales=None,
        expert_ids=torch.arange(top_k, dtype=torch.int32).repeat(tokens, 1),
        weights=torch.ones(tokens, top_k),
        reply_dtype=reply,
    )


def batch_of(one: ExecuteCall) -> TokenBatch:
    return TokenBatch(one.hidden, one.scales, one.expert_ids, one.weights)


class Model:
    """What the engine must do, by the Python rules."""

    def __init__(self) -> None:
        self.queue = FairQueue()
        self.admission = Admission(self.queue, MAX_QUEUED, MAX_BYTES)
        self.under_way: list[tuple[int, list[int], float]] = []
        self.started: list[list[int]] = []
        self.jobs: dict[int, Job] = {}

    def submit(self, caller: str, one: ExecuteCall) -> Overloaded | None:
        try:
            self.admission.check(one.hidden.shape[0], batch_of(one).num_bytes)
        except Overloaded as error:
            return error
        job = Job(caller, one.layer, batch_of(one), one.reply_dtype, 0.0, None, None)  # type: ignore[arg-type]
        self.jobs[one.request_id] = job
        self.queue.put(job)
        return None

    def turn(self, now: float) -> None:
        while self.queue and may_start([tokens for tokens, _, _ in self.under_way], self.queue.tokens, DEPTH):
            jobs = self.queue.take(MAX_BATCH)
            numbers = [number for job in jobs for number, known in self.jobs.items() if known is job]
            self.under_way.append((sum(job.batch.num_tokens for job in jobs), numbers, now))
            self.started.append(numbers)

    def finish(self, which: int, now: float) -> list[int]:
        tokens, numbers, started = self.under_way.pop(which)
        self.admission.computed(tokens, now - started)
        return numbers


def finish(batch: Any) -> None:  # noqa: ANN401
    sums = [
        torch.zeros(tokens, WIDTH, dtype=_dtype(batch)).view(torch.uint8).numpy() for *_, tokens in batch.requests()
    ]
    pairs = [batch.tokens, batch.tokens if batch.top_k == 2 else 0]
    batch.finish(sums, pairs, 0.0, 0.0, 0.0)


def _dtype(batch: Any) -> torch.dtype:  # noqa: ANN401
    return torch.bfloat16 if batch.reply_dtype == 2 else torch.float32


@pytest.mark.parametrize("seed", range(20))
def test_order_and_bounds_are_those_of_the_python_queue(seed: int) -> None:
    chance = random.Random(seed)
    engine, model, inbox = make_engine(), Model(), NATIVE.Inbox()
    batches: list[Any] = []
    tickets: dict[int, int] = {}
    answered: dict[int, int] = {}
    number, clock = 0, 0
    for _ in range(400):
        clock += chance.randint(1, 10_000_000)
        kind = chance.random()
        if kind < 0.6:
            number += 1
            one = call(
                number,
                chance.choice(SIZES),
                layer=chance.choice((1, 1, 2)),
                reply=chance.choice((torch.float32, torch.bfloat16)),
                top_k=chance.choice((1, 1, 2)),
            )
            caller = chance.choice("abc")
            got = inbox.submit(engine, codec.encode_call(one), caller, number, None, "")
            refused = model.submit(caller, one)
            assert (got.refusal is None) == (refused is None)
            if refused is not None:
                assert got.refusal.text == str(refused)
                assert (got.refusal.retry_after is None) == (refused.retry_after is None)
                assert got.refusal.retry_after == pytest.approx(refused.retry_after)
            else:
                tickets[number] = got.ticket
        elif kind < 0.7 and tickets:
            chosen = chance.choice(list(tickets))
            inbox.cancel(engine, tickets[chosen])
            if model.queue.remove(model.jobs[chosen]) or any(chosen in numbers for _, numbers, _ in model.under_way):
                answered[chosen] = 1
        elif batches:
            which = chance.randrange(len(batches))
            finish(batches.pop(which))
            for over in model.finish(which, clock * 1e-9):
                answered.setdefault(over, 0)
        model.turn(clock * 1e-9)
        engine.turn(clock)
        while len(batches) < len(model.under_way):
            batches.append(engine.fetch())
        assert engine.queued_tokens == model.queue.tokens
        assert engine.queued_bytes == model.queue.num_bytes
        assert [batch.tokens for batch in batches] == [tokens for tokens, _, _ in model.under_way]
        for answer in inbox.drain():
            tickets.pop(answer.request_id, None)
            assert answered.pop(answer.request_id) == (0 if answer.refusal is None else answer.refusal.code)
            assert answer.context == answer.request_id
            if answer.refusal is None:
                assert codec.parse_response(answer.response).request_id == answer.request_id
        # What is left of the expected answers is with the device: cancelled there, it is answered when that is done.
        under_way = {one for _, numbers, _ in model.under_way for one in numbers}
        assert set(answered) <= under_way
    assert len(model.started) > 20
    for batch in batches:
        batch.fail("the test is over")


def test_what_ran_out_in_the_queue_is_not_computed() -> None:
    engine, inbox = make_engine(), NATIVE.Inbox()
    inbox.submit(engine, codec.encode_call(call(1, 1)), "a", "computed", None, "")
    engine.turn(time.monotonic_ns())
    for number, one in (
        (2, replace(call(2, 1), timeout=0.001)),
        (3, replace(call(3, 1), timeout=60.0)),
        (4, call(4, 1)),
    ):
        inbox.submit(engine, codec.encode_call(one), "a", number, 0.002 if number == 4 else None, "")
    finish(engine.fetch())
    engine.turn(time.monotonic_ns() + 1_000_000_000)
    batch = engine.fetch()
    assert batch.tokens == 1
    finish(batch)
    engine.turn(time.monotonic_ns())
    answers = {answer.context: answer for answer in inbox.drain()}
    assert answers["computed"].refusal is None
    assert answers[3].refusal is None
    for number in (2, 4):
        assert answers[number].refusal.code == 4
        assert answers[number].refusal.text.startswith("timeout_us ran out after 1.0")
    assert len(inbox) == 0


def test_a_reply_is_what_the_codec_reads() -> None:
    engine, inbox = make_engine(), NATIVE.Inbox()
    one = call(9, 3, reply=torch.bfloat16, top_k=2)
    inbox.submit(engine, codec.encode_call(one), "a", None, None, "")
    engine.turn(0)
    batch = engine.fetch()
    sums = torch.randn(3, WIDTH).bfloat16()
    batch.finish([sums.view(torch.uint8).numpy()], [3, 3], 0.25, 0.5, 0.125)
    engine.turn(0)
    (answer,) = inbox.drain()
    result = codec.decode_result(codec.parse_response(answer.response), 3, WIDTH, torch.bfloat16)
    assert torch.equal(result.partials, sums)
    assert result.request_id == 9
    assert dict(result.receipt) == {0: 3, 1: 3}
    assert (result.timings.copy_in, result.timings.compute, result.timings.copy_out) == (0.25, 0.5, 0.125)
    assert result.timings.decode > 0


def test_a_batch_with_other_pairs_than_asked_for_fails() -> None:
    engine, inbox = make_engine(), NATIVE.Inbox()
    inbox.submit(engine, codec.encode_call(call(9, 3)), "a", None, None, "")
    engine.turn(0)
    batch = engine.fetch()
    batch.finish([torch.zeros(3, WIDTH).view(torch.uint8).numpy()], [2, 0], 0.0, 0.0, 0.0)
    engine.turn(0)
    (answer,) = inbox.drain()
    assert (answer.refusal.code, answer.refusal.text) == (13, "layer 1: the device computed pairs [2, 0], not [3, 0]")
    assert answer.response is None


def test_giving_up_answers_everyone_at_once_and_keeps_what_the_device_may_use() -> None:
    engine, inbox = make_engine(), NATIVE.Inbox()
    for number in (1, 2):
        inbox.submit(engine, codec.encode_call(call(number, 300)), "a", number, None, "")
    for number in (3, 4, 5):
        inbox.submit(engine, codec.encode_call(call(number, 1)), "a", number, None, "")
    engine.turn(0)
    engine.abandon("the device is lost")
    engine.turn(0)
    answers = {answer.context: answer.refusal for answer in inbox.drain()}
    assert set(answers) == {1, 2, 3, 4, 5}
    assert {(refusal.code, refusal.text) for refusal in answers.values()} == {(14, "the device is lost")}
    assert inbox.submit(engine, codec.encode_call(call(6, 1)), "a", 6, None, "").refusal.text == "the device is lost"
    held = len(inbox)
    assert held >= 2
    batch = engine.fetch()
    requests = len(batch.requests())
    finish(batch)
    engine.turn(0)
    assert inbox.drain() == []
    assert len(inbox) == held - requests
    engine.open()
    assert inbox.submit(engine, codec.encode_call(call(7, 1)), "a", 7, None, "").refusal is None


def test_a_thread_turns_by_itself_and_rings() -> None:
    engine, inbox = make_engine(), NATIVE.Inbox()

    def compute() -> None:
        while (batch := engine.fetch()) is not None:
            finish(batch)

    worker = threading.Thread(target=compute)
    worker.start()
    engine.start()
    poller = select.poll()
    poller.register(inbox.fileno(), select.POLLIN)
    for number in range(500):
        inbox.submit(engine, codec.encode_call(call(number, 1)), "a", number, None, "")
        answers: list[Any] = []
        while not answers:
            assert poller.poll(5000), number
            answers = inbox.drain()
        assert [answer.context for answer in answers] == [number]
    engine.interrupt()
    worker.join(5)
    engine.stop()
    assert not worker.is_alive()
