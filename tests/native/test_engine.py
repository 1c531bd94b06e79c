"""The engine's order, bounds, cancellations and endings, against the Python queue as a model, one turn at a time."""

import random
import select
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch

from expertd._native import Batch, CallbackExecutor, Engine, Inbox, NodeExecutor, OwnedLayer, Tally
from expertd.kernels.numerics.backend import TokenBatch
from expertd.proto import codec
from expertd.proto.base.errors import Overloaded
from expertd.proto.codec import ExecuteCall
from tests.support.model.admission import Admission
from tests.support.model.queue import Job, Next, Queues, next_batch
from tests.support.model.requests import encode_request, parse_request
from tests.support.native.placements import placement_of

OVERLOADED = 8
WIDTH, MAX_BATCH, MAX_QUEUED, MAX_BYTES, DEPTH = 128, 600, 2000, 300_000, 2
SIZES = (1, 1, 2, 5, 100, 255, 256, 300, 700)


def make_engine(tally: Tally | None = None, *, express: bool = False) -> tuple[Any, Any, Any]:
    """An engine, open, what its batches are fetched from, and an inbox."""
    engine, executor = (
        Engine(
            placement_of(),
            max_batch_tokens=MAX_BATCH,
            max_queued_tokens=MAX_QUEUED,
            max_queued_bytes=MAX_BYTES,
            tally=tally or Tally((1, 2), 4, (1.0,), (1.0,)),
        ),
        CallbackExecutor(DEPTH, express=express),
    )
    engine.use(executor)
    engine.open()
    return engine, executor, Inbox()


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

    def __init__(self, *, express: bool) -> None:
        self.express = express
        self.queue = Queues(express=express)
        self.admission = Admission(self.queue, MAX_QUEUED, MAX_BYTES)
        self.under_way: list[tuple[int, list[int], float]] = []
        self.express_one: list[int] | None = None
        """Which of them is in the place for small ones."""
        self.started: list[list[int]] = []
        self.jobs: dict[int, Job] = {}
        self.evicted: dict[int, Overloaded] = {}

    def submit(self, identity: str, caller: str, one: ExecuteCall) -> Overloaded | None:
        job = Job(caller, one.layer, batch_of(one), one.reply_dtype, 0.0, None, identity)
        try:
            evicted = self.admission.put(job)
        except Overloaded as error:
            return error
        self.jobs[one.request_id] = job
        self.evicted |= {self.number_of(left): error for left, error in evicted}
        return None

    def number_of(self, job: Job) -> int:
        return next(number for number, known in self.jobs.items() if known is job)

    def turn(self, now: float) -> None:
        while what := self.next():
            jobs = self.queue.take(what, MAX_BATCH)
            numbers = [self.number_of(job) for job in jobs]
            self.under_way.append((sum(job.batch.num_tokens for job in jobs), numbers, now))
            if what is Next.EXPRESS:
                self.express_one = numbers
            self.started.append(numbers)

    def next(self) -> Next | None:
        others = [tokens for tokens, numbers, _ in self.under_way if numbers is not self.express_one]
        free = self.express and self.express_one is None
        return next_batch(others, free, self.queue.large.tokens, self.queue.small.tokens, DEPTH)

    def finish(self, which: int, now: float) -> list[int]:
        tokens, numbers, started = self.under_way.pop(which)
        express = numbers is self.express_one
        if express:
            self.express_one = None
        self.admission.computed(tokens, now - started, express=express)
        return numbers


def finish(batch: Batch) -> None:
    pairs = [batch.tokens, batch.tokens if batch.top_k == 2 else 0]
    batch.finish(pairs, 0.0, 0.0, 0.0)


def settle(engine: Engine, now: int = 0) -> None:
    """Turn until the pool has made room for long answers, and whatever starts then has started."""
    deadline = time.monotonic() + 5
    while engine.handed_out and time.monotonic() < deadline:
        time.sleep(0.0002)
    engine.turn(now)


@pytest.mark.parametrize("tokens", [1, 500])
def test_who_wants_no_expert_gets_zeros_without_the_device(tokens: int) -> None:
    engine, _, inbox = make_engine()
    nothing = replace(call(1, tokens), expert_ids=torch.full((tokens, 1), -1, dtype=torch.int32))
    inbox.submit(engine, codec.encode_call(nothing), "caller", None, None, "")
    engine.turn(time.monotonic_ns())
    settle(engine)
    settle(engine)
    (answer,) = inbox.drain()
    result = codec.decode_result(codec.parse_response(answer.response), tokens, WIDTH, torch.float32)
    assert not result.partials.any()
    assert result.receipt == {}


def test_a_lone_request_with_a_long_answer_waits_for_no_other_thread() -> None:
    engine, executor, inbox = make_engine()
    tokens = 200
    for number in (1, 2):
        inbox.submit(engine, codec.encode_call(call(number, tokens)), "caller", None, None, "")
        engine.turn(time.monotonic_ns())
        started = threading.Timer(5, executor.interrupt)
        started.start()
        batch = executor.fetch()
        started.cancel()
        assert batch is not None, "it is not on the device yet"
        torch.frombuffer(batch.requests()[0][4], dtype=torch.float32).fill_(2.0)
        finish(batch)
        engine.turn(time.monotonic_ns())
        (answer,) = inbox.drain()
        result = codec.decode_result(codec.parse_response(answer.response), tokens, WIDTH, torch.float32)
        assert result.partials.eq(2.0).all()


@pytest.mark.parametrize("express", [False, True])
@pytest.mark.parametrize("identities", ["x", "xyz"])
@pytest.mark.parametrize("seed", range(20))
def test_order_and_bounds_are_those_of_the_python_queue(seed: int, identities: str, express: bool) -> None:
    chance = random.Random(seed)
    tally = Tally((1, 2), 4, (1.0,), (1.0,))
    (engine, executor, inbox), model = make_engine(tally, express=express), Model(express=express)
    batches: list[Any] = []
    tickets: dict[int, int] = {}
    answered: dict[int, int] = {}
    number, clock, evictions, refusals = 0, 0, 0, 0
    for _ in range(400):
        clock += chance.randint(1, 10_000_000)
        kind = chance.random()
        if kind < 0.65:
            number += 1
            one = call(
                number,
                chance.choice(SIZES),
                layer=chance.choice((1, 1, 2)),
                reply=chance.choice((torch.float32, torch.bfloat16)),
                top_k=chance.choice((1, 1, 2)),
            )
            # Of whom the first sends most, so that others come to a queue that is its.
            identity, caller = chance.choice(identities[0] * 4 + identities), chance.choice("abc")
            got = inbox.submit(engine, codec.encode_call(one), caller, number, None, "", identity=identity)
            refused = model.submit(identity, caller, one)
            assert (got.refusal is None) == (refused is None)
            if refused is not None:
                refusals += 1
                assert got.refusal.text == str(refused)
                assert (got.refusal.retry_after is None) == (refused.retry_after is None)
                assert got.refusal.retry_after == pytest.approx(refused.retry_after)
            else:
                tickets[number] = got.ticket
        elif kind < 0.75 and tickets:
            chosen = chance.choice(list(tickets))
            inbox.cancel(engine, tickets[chosen])
            if model.queue.remove(model.jobs[chosen]) or any(chosen in numbers for _, numbers, _ in model.under_way):
                answered[chosen] = 1
        for _ in range(0 if kind < 0.75 else min(len(batches), chance.choice((1, 1, 1, 1, 1, 2)))):
            which = chance.randrange(len(batches))
            finish(batches.pop(which))
            for over in model.finish(which, clock * 1e-9):
                answered.setdefault(over, 0)
        model.turn(clock * 1e-9)
        engine.turn(clock)
        settle(engine, clock)
        # Those whose answers are given room by other threads come after what started behind them.
        come = [executor.fetch() for _ in model.under_way[len(batches) :]]
        for tokens, numbers, _ in model.under_way[len(batches) :]:
            job = model.jobs[numbers[0]]
            wanted = (tokens, job.layer, job.batch.expert_ids.shape[1], codec.DTYPE_CODES[job.reply_dtype])
            kinds = [(batch.tokens, batch.weights_key, batch.top_k, batch.sums_dtype) for batch in come]
            batches.append(come.pop(kinds.index(wanted)))
        assert engine.queued_tokens == model.queue.tokens
        assert engine.queued_bytes == model.queue.num_bytes
        assert [batch.tokens for batch in batches] == [tokens for tokens, _, _ in model.under_way]
        answered |= dict.fromkeys(model.evicted, OVERLOADED)
        for answer in inbox.drain():
            tickets.pop(answer.request_id, None)
            if error := model.evicted.pop(answer.request_id, None):
                evictions += 1
                assert answer.refusal.text == str(error)
                assert answer.refusal.retry_after == pytest.approx(error.retry_after)
            assert answered.pop(answer.request_id) == (0 if answer.refusal is None else answer.refusal.code)
            assert answer.context == answer.request_id
            if answer.refusal is None:
                assert codec.parse_response(answer.response).request_id == answer.request_id
        # What is left of the expected answers is with the device: cancelled there, it is answered when that is done.
        under_way = {one for _, numbers, _ in model.under_way for one in numbers}
        assert set(answered) <= under_way
    assert len(model.started) > 20
    assert (evictions > 0) == (len(identities) > 1)
    assert tally.evictions == evictions
    # An eviction is no refusal that has to come at once.
    assert sum(tally.refusal_seconds()[0]) == refusals
    for batch in batches:
        batch.fail("the test is over")


def test_express_batches_tell_the_devices_rate_only_until_others_do() -> None:
    engine, executor, inbox = make_engine(express=True)
    clock = 0

    def submit(tokens: int) -> Any:  # noqa: ANN401
        return inbox.submit(engine, codec.encode_call(call(1, tokens)), "caller", None, None, "")

    def turn() -> None:
        settle(engine, clock)
        settle(engine, clock)

    def compute(tokens: int, seconds: float) -> None:
        nonlocal clock
        submit(tokens)
        turn()
        clock += int(seconds * 1e9)
        finish(executor.fetch())
        turn()

    def seconds_for_700() -> float:
        """That a request is told for which there is no room."""
        for _ in range(2):
            assert submit(400).refusal is None
        return float(submit(700).refusal.retry_after)

    for _ in range(3):
        compute(1, 0.001)
    assert seconds_for_700() == pytest.approx(700 / 1000)
    turn()
    clock += 40_000_000
    for _ in range(2):
        finish(executor.fetch())
    turn()
    for _ in range(50):
        compute(1, 0.001)
    assert seconds_for_700() == pytest.approx(700 / 10_000)


def test_what_many_threads_submit_and_evict_is_answered_once_and_leaves_the_room_empty() -> None:
    tally = Tally((1, 2), 4, (1.0,), (1.0,))
    engine, executor, _ = make_engine(tally)
    answers: Counter[int] = Counter()
    refused: list[bool] = []

    def compute() -> None:
        full = time.monotonic() + 20
        while (batch := executor.fetch()) is not None:
            # The first one until there is no room any more, however slowly others offer.
            while not tally.evictions and time.monotonic() < full:
                time.sleep(0.001)
            time.sleep(0.002)
            finish(batch)

    def offer(identity: str, tokens: int) -> None:
        inbox = Inbox()
        # Long enough to be checked without Python's lock.
        message = codec.encode_call(call(1, tokens))
        submitted = [inbox.submit(engine, message, "a", None, None, "", identity=identity) for _ in range(300)]
        refused.extend(one.refusal is not None for one in submitted)
        deadline = time.monotonic() + 20
        while len(inbox) and time.monotonic() < deadline:
            answers.update(0 if answer.refusal is None else answer.refusal.code for answer in inbox.drain())
            time.sleep(0.001)

    sizes = {"a": 300, "b": 300, "c": 260, "d": 700}
    threads = [threading.Thread(target=offer, args=item) for item in sizes.items()]
    worker = threading.Thread(target=compute)
    engine.start()
    worker.start()
    threads[0].start()
    # The first one's jobs fill the room: what others offer has to evict some.
    while len(refused) < 300:
        assert threads[0].is_alive()
        time.sleep(0.001)
    for thread in threads[1:]:
        thread.start()
    for thread in threads:
        thread.join(30)
    executor.interrupt()
    worker.join(5)
    engine.stop()
    assert sum(answers.values()) + sum(refused) == 4 * 300
    assert set(answers) <= {0, OVERLOADED}
    assert answers[OVERLOADED] == tally.evictions > 0
    assert (engine.queued_tokens, engine.queued_bytes, tally.in_flight) == (0, 0, 0)


def test_what_a_device_that_hangs_has_is_not_waited_for_but_what_others_have_is() -> None:
    halves = [OwnedLayer(1, (place,), experts_text="", key=1) for place in (0, 1)]
    layer = OwnedLayer(1, (0, 1), experts_text="0-1", key=1, devices=halves)
    devices: list[Any] = [CallbackExecutor(DEPTH), CallbackExecutor(DEPTH)]
    node, inbox = NodeExecutor(devices), make_engine()[2]
    engine = Engine(
        placement_of(layers=(1,), owned=[layer]),
        max_batch_tokens=MAX_BATCH,
        max_queued_tokens=MAX_QUEUED,
        max_queued_bytes=MAX_BYTES,
        tally=Tally((1,), 4, (1.0,), (1.0,)),
    )
    engine.use(node)
    engine.open()
    for one in (call(1, 300, top_k=2), call(2, 400)):
        inbox.submit(engine, codec.encode_call(one), "caller", None, None, "")
        settle(engine)
        settle(engine)
    engine.placement = placement_of(layers=(1,), owned=[layer], epoch=2)
    both, alone, hung = devices[0].fetch(), devices[0].fetch(), devices[1].fetch()
    assert (both.tokens, alone.tokens, hung.tokens) == (300, 400, 300)
    node.lose(1, hangs=True)
    settle(engine)
    assert [answer.refusal.text for answer in inbox.drain()] == ["device 1 is lost; use another replica"]
    assert engine.uses_before(2)
    alone.finish([400], 0.0, 0.0, 0.0)
    settle(engine)
    settle(engine)
    assert [answer.refusal for answer in inbox.drain()] == [None]
    assert not engine.uses_before(2)
    for batch in (both, hung):
        batch.fail("the test is over")


def test_what_ran_out_in_the_queue_is_not_computed() -> None:
    engine, executor, inbox = make_engine()
    inbox.submit(engine, codec.encode_call(call(1, 1)), "a", "computed", None, "")
    engine.turn(time.monotonic_ns())
    for number, one in (
        (2, replace(call(2, 1), timeout=0.001)),
        (3, replace(call(3, 1), timeout=60.0)),
        (4, call(4, 1)),
    ):
        inbox.submit(engine, codec.encode_call(one), "a", number, 0.002 if number == 4 else None, "")
    finish(executor.fetch())
    engine.turn(time.monotonic_ns() + 1_000_000_000)
    batch = executor.fetch()
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


def test_the_longest_timeouts_do_not_run_out() -> None:
    engine, executor, inbox = make_engine()
    longest = replace(parse_request(codec.encode_call(call(1, 1))), timeout_us=2**64 - 1)
    inbox.submit(engine, encode_request(longest), "a", None, None, "")
    inbox.submit(engine, codec.encode_call(call(2, 1)), "a", None, 1e300, "")
    engine.turn(time.monotonic_ns())
    assert inbox.drain() == []
    batch = executor.fetch()
    assert batch.tokens == 2
    finish(batch)
    engine.turn(time.monotonic_ns())
    assert [answer.refusal for answer in inbox.drain()] == [None, None]


def test_no_kind_of_a_connections_requests_waits_for_what_came_later() -> None:
    engine, executor, inbox = make_engine()

    def submit(layer: int) -> None:
        # Two do not fit in a batch.
        inbox.submit(engine, codec.encode_call(call(layer, 310, layer=layer)), "a", None, None, "")

    def fetch() -> Any:  # noqa: ANN401
        engine.turn(0)
        settle(engine)
        return executor.fetch()

    under_way = []
    for _ in range(DEPTH):
        submit(1)
        under_way.append(fetch())
    for layer in (1, 2):
        submit(layer)
    for _ in range(4):
        submit(1)
        finish(under_way.pop(0))
        under_way.append(fetch())
    assert [batch.weights_key for batch in under_way] == [1, 1]
    order = [answer.request_id for answer in inbox.drain()]
    assert order == [1, 1, 1, 2]
    for batch in under_way:
        finish(batch)


def test_what_ran_out_before_it_waited_did_not_wait() -> None:
    message = codec.encode_call(call(1, 500))
    waited = []
    # The engine may have looked at the clock at any time while the request was read.
    for early in range(0, 100_000, 500):
        engine, _, inbox = make_engine()
        assert inbox.submit(engine, message, "a", 1, 0.0, "").refusal is None
        engine.turn(time.monotonic_ns() - early)
        waited += [answer.refusal.text for answer in inbox.drain()]
    assert "timeout_us ran out after 0.000000 s in the queue" in waited
    assert all(text.startswith("timeout_us ran out after 0.0") for text in waited)


def test_a_reply_is_what_the_codec_reads() -> None:
    engine, executor, inbox = make_engine()
    one = call(9, 3, reply=torch.bfloat16, top_k=2)
    inbox.submit(engine, codec.encode_call(one), "a", None, None, "")
    engine.turn(0)
    batch = executor.fetch()
    sums = torch.randn(3, WIDTH).bfloat16()
    ((*_, place, _),) = batch.requests()
    place[:] = codec.flat_bytes(sums).numpy().data
    batch.finish([3, 3], 0.25, 0.5, 0.125)
    engine.turn(0)
    (answer,) = inbox.drain()
    result = codec.decode_result(codec.parse_response(answer.response), 3, WIDTH, torch.bfloat16)
    assert torch.equal(result.partials, sums)
    assert result.request_id == 9
    assert dict(result.receipt) == {0: 3, 1: 3}
    assert (result.timings.copy_in, result.timings.compute, result.timings.copy_out) == (0.25, 0.5, 0.125)
    assert result.timings.decode > 0


def test_a_batch_with_other_pairs_than_asked_for_fails() -> None:
    engine, executor, inbox = make_engine()
    inbox.submit(engine, codec.encode_call(call(9, 3)), "a", None, None, "")
    engine.turn(0)
    batch = executor.fetch()
    batch.finish([2, 0], 0.0, 0.0, 0.0)
    engine.turn(0)
    (answer,) = inbox.drain()
    assert (answer.refusal.code, answer.refusal.text) == (13, "layer 1: the device computed pairs [2, 0], not [3, 0]")
    assert answer.response is None


def test_giving_up_answers_everyone_at_once_and_keeps_what_the_device_may_use() -> None:
    engine, executor, inbox = make_engine()
    for number in (1, 2):
        inbox.submit(engine, codec.encode_call(call(number, 300)), "a", number, None, "")
    for number in (3, 4, 5):
        inbox.submit(engine, codec.encode_call(call(number, 1)), "a", number, None, "")
    engine.turn(0)
    settle(engine)
    engine.abandon("the device is lost")
    engine.turn(0)
    answers = {answer.context: answer.refusal for answer in inbox.drain()}
    assert set(answers) == {1, 2, 3, 4, 5}
    assert {(refusal.code, refusal.text) for refusal in answers.values()} == {(14, "the device is lost")}
    assert inbox.submit(engine, codec.encode_call(call(6, 1)), "a", 6, None, "").refusal.text == "the device is lost"
    held = len(inbox)
    assert held >= 2
    batch = executor.fetch()
    requests = len(batch.requests())
    finish(batch)
    engine.turn(0)
    settle(engine)
    assert inbox.drain() == []
    assert len(inbox) == held - requests
    engine.open()
    assert inbox.submit(engine, codec.encode_call(call(7, 1)), "a", 7, None, "").refusal is None


def test_a_thread_turns_by_itself_and_rings() -> None:
    engine, executor, inbox = make_engine()

    def compute() -> None:
        while (batch := executor.fetch()) is not None:
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
    executor.interrupt()
    worker.join(5)
    engine.stop()
    assert not worker.is_alive()
