"""What the engine counts, against a simple model, one turn at a time; and while threads count and read at once."""

import random
import shutil
import subprocess
import time
from bisect import bisect_left
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd._native import Batch, OwnedLayer, Sampler
from expertd.proto import codec
from expertd.proto import expert_shard_pb2 as pb
from expertd.server.telemetry.metrics import TOKEN_BUCKETS
from tests.support.native.build import NATIVE, ROOT, build, sanitizer
from tests.support.native.hand_turned import EXPERTS, LAYERS, MAX_QUEUED, WIDTH, HandTurned, message, pairs_of
from tests.support.native.placements import placement_of

OK, CANCELLED, INVALID, EXPIRED, NOT_FOUND, EXHAUSTED, INTERNAL, UNAVAILABLE = 0, 1, 3, 4, 5, 8, 13, 14
# The last ones: their answers are long, and made by a thread of the pool.
SIZES = (1, 3, 64, 65, 255, 300)
OPERATIONS = (*("submit",) * 3, *("finish",) * 2, "fail", "miscount", "cancel", "expire")
OFTEN_REFUSED = ("nonsense", "layer", "too much", "abandon")


class Model:
    """An engine, and what it must have counted."""

    def __init__(self) -> None:
        self.turned = HandTurned()
        self.outcomes: Counter[int] = Counter()
        self.pairs = np.zeros((len(LAYERS), 4), np.uint64)
        self.tokens = 0
        self.waits: Counter[int] = Counter()
        self.batches: list[int] = []
        self.busy = 0.0
        self.texts: list[str] = []
        self.batches_under_way: list[Batch] = []
        self.jobs: dict[int, tuple[int, int, list[int]]] = {}
        """Ticket, layer's row and pairs by number, of those that have no answer."""
        self.number = 0

    def do(self, operation: str, chance: random.Random) -> None:
        self.number += 1
        layer, top_k, tokens = chance.choice(LAYERS), chance.choice((1, 2)), chance.choice(SIZES)
        submit = self.turned.submit
        if operation in ("submit", "expire"):
            # What is late is found when a batch takes it.
            late = 0.0 if operation == "expire" else None
            submitted = submit(message(self.number, tokens, layer, top_k), timeout=late)
            if submitted.refusal is None:
                self.jobs[self.number] = (submitted.ticket or 0, layer - 1, [tokens, tokens if top_k == 2 else 0])
            else:
                self.refuse(submitted.refusal.code, submitted.refusal.text)
        elif operation == "nonsense":
            refused = submit(b"\xff").refusal
            self.refuse(INVALID, refused.text if refused else "")
        elif operation == "layer":
            refused = submit(message(self.number, layer=9)).refusal
            assert refused is not None
            # A full queue is seen first.
            assert refused.code in (NOT_FOUND, EXHAUSTED)
            self.refuse(refused.code, refused.text)
        elif operation == "too much":
            queued = self.turned.engine.queued_tokens
            text = f"{queued} tokens are queued and num_tokens is 1000; at most {MAX_QUEUED} may wait"
            submitted = submit(message(self.number, 1000, layer))
            if queued <= MAX_QUEUED - 1000:
                self.jobs[self.number] = (submitted.ticket or 0, layer - 1, [1000, 0])
            else:
                assert submitted.refusal is not None
                assert submitted.refusal.text.startswith(text)
                self.refuse(EXHAUSTED, submitted.refusal.text)
        elif operation == "cancel" and self.jobs:
            self.turned.inbox.cancel(self.turned.engine, self.jobs[chance.choice(list(self.jobs))][0])
        elif operation == "abandon" and chance.random() < 0.2:
            self.turned.engine.abandon("gone")
            self.answered()
            self.turned.engine.open()
        elif self.batches_under_way:
            self.end(self.batches_under_way.pop(chance.randrange(len(self.batches_under_way))), operation)

    def end(self, batch: Batch, operation: str) -> None:
        if operation == "fail":
            batch.fail("no")
        elif operation == "miscount":
            batch.finish([0, 7], 0.0, 0.25, 0.0)
        else:
            self.batches.append(batch.tokens)
            self.busy += 0.25
            batch.finish(pairs_of(batch), 0.125, 0.25, 0.5)

    def refuse(self, code: int, text: str) -> None:
        self.outcomes[code] += 1
        self.texts.append("the caller gave up" if code == CANCELLED else text)

    def answered(self) -> None:
        """Count what is answered by now; fetch what has started."""
        for answer in self.turned.turn():
            _, row, pairs = self.jobs.pop(answer.request_id)
            if answer.refusal is not None:
                self.refuse(answer.refusal.code, answer.refusal.text)
                continue
            self.outcomes[OK] += 1
            self.tokens += pairs[0]
            self.pairs[row, list(EXPERTS)] += np.array(pairs, np.uint64)
        # Were too few counted, some would never be computed; were too many, this would wait for ever.
        while self.waits.total() < sum(self.turned.tally.queue_wait(row)[0] for row in (0, 1)):
            batch = self.turned.fetch()
            self.waits[batch.weights_key] += len(batch.requests())
            self.batches_under_way.append(batch)

    def check(self) -> None:
        tally = self.turned.tally
        outcomes = {code: count for code in range(17) if (count := tally.outcomes(code))}
        assert outcomes == +self.outcomes
        assert tally.in_flight == len(self.jobs)
        assert (tally.tokens, tally.pairs) == (self.tokens, self.pairs.sum())
        assert np.array_equal(np.frombuffer(tally.expert_pairs(), np.uint64).reshape(self.pairs.shape), self.pairs)
        counts = [0] * (len(TOKEN_BUCKETS) + 1)
        for tokens in self.batches:
            counts[bisect_left(TOKEN_BUCKETS, tokens)] += 1
        assert tally.batch_tokens() == (counts, sum(self.batches))
        assert tally.busy_seconds == self.busy
        assert [tally.queue_wait(row)[0] for row in (0, 1)] == [self.waits[layer] for layer in LAYERS]
        assert [sum(counts) for counts, _ in tally.stages()] == [self.outcomes[OK]] * 7
        assert sum(tally.refusal_seconds()[0]) == self.outcomes[EXHAUSTED]
        if len(self.texts) <= 20:
            assert sorted(told.text for told in tally.refusals()) == sorted(self.texts)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from(OPERATIONS + OFTEN_REFUSED), max_size=60), st.integers(0, 1 << 30))
def test_counts_are_the_models(operations: list[str], seed: int) -> None:
    model, chance = Model(), random.Random(seed)
    for operation in operations:
        model.do(operation, chance)
        model.answered()
        model.check()
    while model.batches_under_way:
        model.do("finish", chance)
        model.answered()
        model.check()
    assert (model.jobs, model.turned.tally.in_flight, model.turned.engine.queued_tokens) == ({}, 0, 0)


def test_a_request_is_counted_before_its_caller_knows() -> None:
    turned = HandTurned()
    turned.submit(message())
    assert turned.tally.in_flight == 1
    turned.engine.turn(0)
    batch = turned.fetch()
    batch.finish(pairs_of(batch), 0.0, 0.0, 0.0)
    turned.engine.turn(0)
    assert (turned.tally.outcomes(OK), turned.tally.in_flight) == (1, 0)
    assert len(turned.inbox.drain()) == 1


def test_the_last_answers_and_refusals_are_remembered() -> None:
    turned = HandTurned()
    before, before_monotonic = time.time(), time.monotonic()
    for number in range(1, 1004):
        turned.answer(message(number, tokens=number % 5 + 1), (0.0, number, 0.0))
    for layer in range(10, 35):
        turned.submit(message(layer=layer), caller=f"caller {layer}")
    answers, refusals = turned.tally.answers(), turned.tally.refusals()
    assert [(tokens, seconds[3]) for _, tokens, seconds in answers] == [(n % 5 + 1, n) for n in range(4, 1004)]
    assert [told.caller for told in refusals] == [f"caller {layer}" for layer in range(15, 35)]
    assert {told.code for told in refusals} == {NOT_FOUND}
    for times, first, now in (
        ([at for at, _, _ in answers], before_monotonic, time.monotonic()),
        ([told.time for told in refusals], before, time.time()),
    ):
        assert times == sorted(times)
        assert first <= times[0]
        assert times[-1] <= now


def test_only_those_are_told_of_whom_somebody_asked_for() -> None:
    turned = HandTurned()

    def told(**wanted: bool) -> list[tuple[int, int, bytes]]:
        turned.tally.tell_of(**{"everything": False, "traced": False} | wanted)
        for number, traceparent in ((1, ""), (2, "its span")):
            turned.answer(message(number, tokens=3, top_k=2), traceparent=traceparent)
            turned.submit(message(number + 2, layer=9), caller="b", traceparent=traceparent)
        return [(one.request_id, one.code, one.traceparent) for one in turned.tally.take_told()[0]]

    assert told() == []
    assert told(traced=True) == [(2, OK, b"its span"), (4, NOT_FOUND, b"its span")]
    assert told(everything=True) == [
        (1, OK, b""),
        (3, NOT_FOUND, b""),
        (2, OK, b"its span"),
        (4, NOT_FOUND, b"its span"),
    ]
    before = time.time()
    answered = turned.answer(message(7, tokens=3, top_k=2), (0.25, 0.5, 0.125))
    assert answered.response is not None
    replied = codec.decode_result(codec.parse_response(answered.response), 3, WIDTH, torch.float32).timings
    ((one,), _) = turned.tally.take_told()
    assert (one.request_id, one.layer, one.caller, one.tokens, one.pairs, one.text) == (7, 1, "a", 3, 6, "")
    assert one.seconds[0] == pytest.approx(replied.decode, abs=1e-9)
    assert one.seconds[2:5] == [0.25, 0.5, 0.125]
    assert before <= one.time <= time.time()
    assert turned.tally.take_told() == ([], 0)


def test_a_span_need_not_be_text() -> None:
    turned = HandTurned()
    turned.tally.tell_of(everything=False, traced=True)
    request = pb.ExecuteRequest.FromString(message())
    # Cut at 64 bytes, in the middle of a character.
    request.traceparent = "a" + "\u00ff" * 100
    turned.answer(request.SerializeToString())
    ((one,), _) = turned.tally.take_told()
    assert one.traceparent == request.traceparent.encode()[:64]


def test_who_is_not_listened_to_is_dropped_and_counted() -> None:
    turned = HandTurned()
    turned.tally.tell_of(everything=True, traced=False)
    for number in range(5000):
        turned.submit(message(number, layer=9))
    told, dropped = turned.tally.take_told()
    assert dropped == 5000 - 4096
    assert [one.request_id for one in told] == list(range(4096))
    turned.submit(message(1, layer=9))
    told, dropped = turned.tally.take_told()
    assert (len(told), dropped) == (1, 0)


def test_waits_end_when_a_batch_begins() -> None:
    turned = HandTurned()
    begin = time.monotonic()
    turned.submit(message())
    time.sleep(0.02)
    turned.turn()
    waited = time.monotonic() - begin
    time.sleep(0.02)
    batch = turned.fetch()
    batch.finish(pairs_of(batch), 0.0, 0.0, 0.0)
    turned.turn()
    jobs, seconds = turned.tally.queue_wait(0)
    assert (jobs, turned.tally.queue_wait(1)) == (1, (0, 0.0))
    assert 0.02 <= seconds <= waited


def test_samples_are_tokens_of_the_answers() -> None:
    sampler, chance = Sampler(1.0, 7), _Chance(7)
    turned = HandTurned(sampler)
    for number in range(1, 30):
        sent = message(number, tokens=5, top_k=2, reply_dtype=torch.bfloat16)
        turned.submit(sent)
        turned.turn()
        batch = turned.fetch()
        ((hidden, _, ids, weights, sums, _),) = batch.requests()
        sums[:] = random.Random(number).randbytes(len(sums))
        next(chance)
        row = next(chance) % 5
        parts = [bytes(part) for part in (hidden, ids, weights, sums)]
        expected = [part[row * len(part) // 5 : (row + 1) * len(part) // 5] for part in parts]
        batch.finish(pairs_of(batch), 0.0, 0.0, 0.0)
        turned.turn()
        sample = sampler.take()
        assert sample is not None
        assert (sample.layer, sample.hidden_dtype, sample.sums_dtype, bytes(sample.scales)) == (1, 2, 2, b"")
        found = [bytes(part) for part in (sample.hidden, sample.ids, sample.weights, sample.sums)]
        assert found == expected
        assert len(sample.hidden) == 2 * WIDTH


def test_the_rate_is_the_share_of_answers_and_eight_wait() -> None:
    sampler, chance = Sampler(0.25, 99), _Chance(99)
    turned = HandTurned(sampler)
    chosen = 0
    for number in range(1, 101):
        turned.answer(message(number))
        if next(chance) < 0.25 * _Chance.MODULUS:
            chosen += 1
            next(chance)
    assert 15 < chosen < 35
    assert sampler.dropped == chosen - 8
    assert all(sampler.take() is not None for _ in range(8))
    sampler.interrupt()
    assert sampler.take() is None


@pytest.mark.parametrize("kind", [None, "thread", "address,undefined"])
def test_threads_that_count_lose_nothing_beside_those_that_read(tmp_path: Path, kind: str | None) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    sources = [
        NATIVE / f"{name}.cc" for name in ("engine/tally", "engine/callers", "engine/sampler", "request/placement")
    ]
    options = sanitizer(kind) if kind else ("-O2",)
    race = build(tmp_path / "race", [ROOT / "tests/native/tally_race.cc", *sources], *options)
    # What is lost now and then shows in many.
    count = "3000" if kind else "200000"
    done = subprocess.run([race, count], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


class _Chance:
    """The numbers of minstd_rand, as the C++ standard has it."""

    MODULUS = 2**31 - 1

    def __init__(self, seed: int) -> None:
        self._last = seed

    def __next__(self) -> int:
        self._last = 48271 * self._last % self.MODULUS
        return self._last


def test_old_weights_are_in_use_until_the_last_answer_under_them() -> None:
    turned = HandTurned()
    engine = turned.engine
    turned.submit(message(1))
    turned.turn()
    computing = turned.fetch()
    turned.submit(message(2))
    turned.turn()
    # Others in the place of layer 1, under the key 9.
    engine.placement = placement_of(owned=[OwnedLayer(1, (0, 1, 3), experts_text="0-1,3", key=9)], epoch=2)
    turned.submit(message(3))
    seen = []
    for batch, pairs in ((computing, [1, 0]), (None, [1, 0]), (None, [1, 0, 0])):
        turned.turn()
        batch = batch or turned.fetch()
        seen.append((batch.weights_key, batch.tokens, engine.uses_before(2), engine.uses_before(1)))
        batch.finish(pairs, 0.0, 0.0, 0.0)
        del batch
        assert [answered.refusal for answered in turned.turn()] == [None]
    del computing
    # What came before and what came after is never computed together.
    assert seen == [(1, 1, True, False), (1, 1, True, False), (9, 1, False, False)]
    assert turned.tally.pairs == 3
