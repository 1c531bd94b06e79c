"""Faults in the engine, one turn at a time: what is withheld, until when, and what it keeps from going on: nothing."""

import time

from expertd._native import Answered, Failpoints
from expertd.proto import codec
from tests.support.native.hand_turned import HandTurned, message, pairs_of

SECOND = 1_000_000_000


def faulty(seed: int = 0, **points: tuple[float, float]) -> tuple[HandTurned, Failpoints]:
    """An engine with these probabilities and seconds."""
    rig, failpoints = HandTurned(), Failpoints(str(seed))
    for kind, (probability, seconds) in points.items():
        failpoints.add(kind, probability, seconds)
    rig.engine.use_failpoints(failpoints)
    return rig, failpoints


def compute(rig: HandTurned, now: int, tokens: int = 1) -> list[Answered]:
    """One request, from its arrival until it is computed; what was answered by then."""
    rig.submit(message(tokens=tokens))
    rig.turn(now)
    batch = rig.fetch()
    batch.finish(pairs_of(batch), 0, 0, 0)
    return rig.turn(now)


def test_a_late_answer_comes_in_its_time_whoever_writes_it() -> None:
    for tokens in (1, 300):
        rig, failpoints = faulty(delay=(1, 2.0))
        now = time.monotonic_ns()
        assert compute(rig, now, tokens) == []
        assert rig.turn(now + 2 * SECOND - 1) == []
        (answered,) = rig.turn(now + 2 * SECOND)
        assert answered.response is not None
        assert len(codec.parse_response(answered.response).partials) == 4 * 128 * tokens
        assert failpoints.take_strikes() == [("delay", "")]


def test_a_withheld_answer_is_let_go_when_it_is_cancelled_and_when_the_device_is_given_up() -> None:
    rig, failpoints = faulty(drop=(1, 1e9), reset=(1, 0))
    submitted = [rig.submit(message(number)) for number in (1, 2)]
    rig.turn()
    batch = rig.fetch()
    batch.finish(pairs_of(batch), 0, 0, 0)
    assert rig.turn() == []
    # The engine knows no connection of an inbox.
    assert failpoints.take_strikes() == 2 * [("drop", ""), ("reset", "a")]
    assert submitted[0].ticket is not None
    rig.inbox.cancel(rig.engine, submitted[0].ticket)
    (answered,) = rig.turn()
    assert answered.refusal is not None
    assert (answered.request_id, answered.refusal.text) == (1, "request 1 was cancelled by its caller")
    rig.engine.abandon("given up")
    (answered,) = rig.turn()
    assert answered.refusal is not None
    assert (answered.request_id, answered.refusal.text) == (2, "given up")
    assert rig.tally.in_flight == len(rig.inbox) == 0


def test_a_failed_device_computes_nothing_any_more() -> None:
    rig, failpoints = faulty(seed=3, device_error=(0.5, 0))
    failed = []
    for number in range(20):
        rig.submit(message(number))
        answers = rig.turn()
        failed.append(bool(answers))
        if answers:
            continue
        batch = rig.fetch()
        batch.finish(pairs_of(batch), 0, 0, 0)
        assert len(rig.turn()) == 1
    assert failed == sorted(failed)
    assert failed[-1]
    assert failpoints.take_strikes() == [("device_error", "")]
    assert rig.engine.take_fault() == "the device failed: RuntimeError: failpoint device_error"
