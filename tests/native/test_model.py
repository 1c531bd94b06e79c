"""Which waiting jobs become the next batch: the model that the engine is compared with, by itself."""

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expertd.kernels.numerics.backend import TokenBatch
from expertd.proto.base.errors import Overloaded
from tests.support.model.admission import Admission
from tests.support.model.queue import FairQueue, Job, Queues


def job(caller: str, tokens: int = 1, layer: int = 1, identity: str = "") -> Job:
    hidden = torch.zeros(tokens, 128, dtype=torch.float8_e4m3fn)
    ids = torch.zeros(tokens, 2, dtype=torch.int32)
    batch = TokenBatch(hidden, torch.ones(tokens, 1), ids, torch.ones(tokens, 2))
    return Job(caller, layer, batch, torch.float32, 0.0, None, identity)


def filled(*jobs: Job) -> FairQueue:
    queue = FairQueue()
    for one in jobs:
        queue.put(one)
    return queue


@pytest.mark.parametrize(
    ("sizes", "taken"), [([5, 5, 5, 5], [5, 5, 5]), ([16, 1], [16]), ([10, 7, 6], [10]), ([1], [1]), ([20], [20])]
)
def test_a_callers_jobs_leave_in_order_as_far_as_they_fit(sizes: list[int], taken: list[int]) -> None:
    queue = filled(*(job("a", size) for size in sizes))
    assert [one.batch.num_tokens for one in queue.take(16)] == taken
    assert queue.tokens == sum(sizes) - sum(taken)


def test_a_small_caller_is_in_the_next_batch_whatever_waits_before_it() -> None:
    queue = filled(*(job("large", 16) for _ in range(100)), job("small", 1))
    assert [one.caller for one in queue.take(16)] == ["large"]
    assert [one.caller for one in queue.take(16)] == ["small"]
    assert [one.caller for one in queue.take(16)] == ["large"]


def test_a_small_caller_of_another_layer_waits_for_one_batch_only() -> None:
    queue = filled(*(job("large", 8) for _ in range(100)), job("small", 1, layer=2))
    assert [one.layer for one in queue.take(16)] == [1, 1]
    assert [(one.caller, one.layer) for one in queue.take(16)] == [("small", 2)]


def test_callers_share_a_batch_in_turn() -> None:
    queue = filled(*(job("a") for _ in range(50)), *(job("b") for _ in range(50)), *(job("c") for _ in range(2)))
    assert Counter(one.caller for one in queue.take(20)) == {"a": 9, "b": 9, "c": 2}


def test_connections_share_the_turns_of_their_identity() -> None:
    crowd = [job(f"of the crowd {number}", 4, identity="crowd") for number in range(100)]
    queue = filled(*crowd, *(job("lone", 4, identity="lone") for _ in range(50)))
    assert [one.caller for one in queue.take(16)] == ["of the crowd 0", "lone", "of the crowd 1", "lone"]
    # The identity whose turn it was, and in it the connection, come last now.
    assert [one.caller for one in queue.take(12)] == ["lone", "of the crowd 2", "lone"]


def test_who_has_most_makes_room_for_who_has_less() -> None:
    queue = Queues(express=False)
    admission = Admission(queue, 20, 1 << 20)
    for number in range(20):
        # Alone, an identity may have all.
        assert not admission.put(job(f"{number}", identity="greedy"))
    with pytest.raises(Overloaded, match="20 tokens are queued and num_tokens is 1; at most 20 may wait"):
        admission.put(job("20", identity="greedy"))
    left = admission.put(job("a", 9, identity="modest"))
    assert [one.caller for one, _ in left] == [str(number) for number in range(19, 10, -1)]
    assert "20 tokens may wait, and 20 were this caller's, more than anybody's" in str(left[0][1])
    with pytest.raises(Overloaded, match="20 tokens are queued and num_tokens is 2"):
        # It would have as much as the other then.
        admission.put(job("b", 2, identity="modest"))
    assert queue.tokens == 20


def test_a_batch_is_of_one_layer_dtype_width_and_reply() -> None:
    one = job("a")
    plain = replace(one.batch, hidden=one.batch.hidden.bfloat16(), scales=None)
    wide = replace(one.batch, expert_ids=one.batch.expert_ids[:, :1], weights=one.batch.weights[:, :1])
    others = [
        job("a", layer=2),
        replace(job("a"), batch=plain),
        replace(job("b"), batch=wide),
        replace(job("b"), reply_dtype=torch.bfloat16),
    ]
    last = job("b")
    assert filled(one, *others, last).take(16) == [one, last]


def test_an_empty_queue_gives_nothing() -> None:
    queue = FairQueue()
    assert not queue
    assert queue.take(16) == []


@given(
    st.lists(
        st.tuples(st.sampled_from("abcd"), st.integers(1, 20), st.integers(1, 3), st.sampled_from("xy")), max_size=40
    ),
    st.integers(1, 40),
    st.sets(st.integers(0, 39)),
)
def test_every_job_leaves_exactly_once_in_batches_of_one_kind_within_the_bound(
    arrivals: list[tuple[str, int, int, str]], max_tokens: int, unwanted: set[int]
) -> None:
    jobs = [job(*arrival) for arrival in arrivals]
    queue = filled(*jobs)
    for number in sorted(unwanted & set(range(len(jobs))), reverse=True):
        assert queue.remove(jobs[number])
        assert not queue.remove(jobs.pop(number))
    assert queue.tokens == sum(one.batch.num_tokens for one in jobs)
    assert queue.num_bytes == sum(one.batch.num_bytes for one in jobs)
    left: list[Job] = []
    while batch := queue.take(max_tokens):
        assert len({one.kind for one in batch}) == 1
        tokens = sum(one.batch.num_tokens for one in batch)
        assert tokens <= max_tokens or len(batch) == 1
        left += batch
    assert queue.tokens == 0
    assert not queue
    assert sorted(map(id, left)) == sorted(map(id, jobs))
    for who in itertools.product("xy", "abcd", (1, 2, 3)):
        mine = [one for one in jobs if (one.identity, one.caller, one.layer) == who]
        assert [one for one in left if (one.identity, one.caller, one.layer) == who] == mine
