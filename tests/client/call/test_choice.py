"""The choice of owners, from snapshots."""

import random
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from expertd.client.call.choice import (
    ELSEWHERE,
    NOBODY,
    SHARE_TOKENS,
    Candidate,
    Owners,
    candidates,
    choose,
)
from expertd.client.fleet.member import Member
from expertd.client.placement.assignment import Fleet, place
from expertd.client.transport.grpc_streams import GrpcTransport

BOTH = Owners(torch.ones(2, 3, dtype=torch.bool))
DRAWS = (0.3, 0.6)


def owners(rows: Sequence[Sequence[int]]) -> Owners:
    return Owners(torch.tensor(rows).bool())


def pick(
    owners: Owners, servers: Sequence[Candidate], draws: tuple[float, float] = DRAWS, avoid: int | None = None
) -> Tensor:
    """[experts]: for one token."""
    return choose(owners, servers, draws, 1, avoid).squeeze(0)


def chosen(first: Candidate, second: Candidate, avoid: int | None = None, draws: tuple[float, float] = DRAWS) -> int:
    """Which of two owners of the same experts is asked."""
    (number,) = set(pick(BOTH, (first, second), draws, avoid).tolist())
    return int(number)


def test_of_two_owners_the_one_with_less_to_do_is_asked() -> None:
    some = owners([[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]])
    found = pick(some, (Candidate(7, 90), Candidate(8, 20), Candidate(9, 10)), DRAWS)
    assert found.tolist() == [7, 8, 9, NOBODY]
    assert found.dtype == torch.int64


def test_of_more_two_are_drawn_and_never_the_same_twice() -> None:
    three = owners([[1]] * 3)
    servers = (Candidate(1, 30), Candidate(2, 20), Candidate(3, 10))
    asked = {(a, b): int(pick(three, servers, (a / 3 + 0.1, b / 2 + 0.1))) for a in range(3) for b in range(2)}
    # The second is the next or the one after it, so that the busiest of three is never asked.
    assert asked == {(0, 0): 2, (0, 1): 3, (1, 0): 3, (1, 1): 2, (2, 0): 3, (2, 1): 3}


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_copy_gets_its_share_whoever_else_there_is(count: int) -> None:
    # Others, which own nothing of it, stand between its owners.
    rows = [[int(row % 3 == 0)] for row in range(3 * count)]
    some = owners(rows)
    servers = tuple(Candidate(row) for row in range(len(rows)))
    draws = [(step / 84 + 0.001, 0.5) for step in range(84)]
    asked = Counter(int(pick(some, servers, draw)) for draw in draws)
    assert asked == dict.fromkeys(range(0, 3 * count, 3), 84 // count)


def test_experts_with_the_same_owners_go_to_the_same_one() -> None:
    some = owners([[1, 0, 1], [1, 1, 1], [1, 1, 1], [0, 1, 0]])
    servers = tuple(Candidate(row, row % 2) for row in range(4))
    for first in (0.0, 0.4, 0.99):
        found = pick(some, servers, (first, 0.2))
        assert found[0] == found[2]


def test_nobody_is_chosen_where_nobody_in_use_owns() -> None:
    assert pick(BOTH, (Candidate(1, in_use=False), Candidate(2, in_use=False)), DRAWS).tolist() == [NOBODY] * 3
    assert pick(Owners(BOTH.owned[:0]), (), DRAWS).tolist() == [NOBODY] * 3
    some = owners([[1, 0], [0, 1]])
    assert pick(some, (Candidate(1, in_use=False), Candidate(2)), DRAWS).tolist() == [NOBODY, 2]


@pytest.mark.parametrize(
    "reluctant", [Candidate(1, busy=True), Candidate(1, slow=True), Candidate(1, elsewhere=True), Candidate(1)]
)
def test_one_that_is_busy_elsewhere_or_to_be_avoided_is_asked_only_in_need(reluctant: Candidate) -> None:
    avoid = 1 if reluctant == Candidate(1) else None
    other = Candidate(2, 4000)
    assert chosen(reluctant, other, avoid) == chosen(other, reluctant, avoid) == 2
    assert chosen(reluctant, Candidate(2, in_use=False), avoid) == 1


def test_another_locality_is_asked_once_much_more_is_outstanding_here() -> None:
    assert chosen(Candidate(1, elsewhere=True), Candidate(2, ELSEWHERE - 1)) == 2
    assert chosen(Candidate(1, elsewhere=True), Candidate(2, ELSEWHERE + 1)) == 1
    assert chosen(Candidate(1, 50, elsewhere=True), Candidate(2, 40, elsewhere=True)) == 2


def test_many_owners_elsewhere_do_not_keep_the_near_one_from_being_asked() -> None:
    some = owners([[1]] * 9)
    servers = (*(Candidate(number, elsewhere=True) for number in range(8)), Candidate(8, 1000))
    assert {int(pick(some, servers, (step / 20, 0.7))) for step in range(20)} == {8}


def test_no_number_of_tokens_makes_a_busy_or_avoided_server_the_better_one() -> None:
    assert chosen(Candidate(1, busy=True), Candidate(2, 10**15)) == 2
    assert chosen(Candidate(1), Candidate(2, 10**15, elsewhere=True), avoid=1) == 2
    # Of two in need the one with one reason against it, then the one with less to do.
    assert chosen(Candidate(1, busy=True), Candidate(2, 10**6, busy=True), avoid=1) == 2
    assert chosen(Candidate(1, 50), Candidate(2, 40, busy=True), avoid=1) == 2


def test_turns_decide_between_servers_with_as_much_to_do_and_no_others() -> None:
    assert chosen(Candidate(1, 5), Candidate(2, 5), draws=(0.75, 0.0)) == 2
    assert chosen(Candidate(1, 5), Candidate(2, 5), draws=(0.25, 0.0)) == 1
    assert chosen(Candidate(1, 5), Candidate(2, 6), draws=(0.75, 0.0)) == 1


async def test_a_snapshot_says_who_is_busy_and_how_much_is_outstanding() -> None:
    members = [Member(number, GrpcTransport("127.0.0.1:1")) for number in (3, 4)]
    members[0].busy_until, members[0].outstanding_tokens = 10.0, 50
    members[1].in_use = True
    before, after = (candidates(members, "", now) for now in (9.9, 10.0))
    assert before == (Candidate(3, 50, in_use=False, busy=True), Candidate(4))
    assert after[0] == Candidate(3, 50, in_use=False)


def test_what_a_slower_server_has_to_do_weighs_more() -> None:
    assert chosen(Candidate(1, 40, weight=2.0), Candidate(2, 60)) == 2
    assert chosen(Candidate(1, 20, weight=2.0), Candidate(2, 60)) == 1
    assert {chosen(Candidate(1, weight=2.5), Candidate(2), draws=(first, 0.0)) for first in (0.1, 0.9)} == {2}


def skewed() -> tuple[np.ndarray, Tensor]:
    """Heat by Zipf's law with exponent 1, and owners for it: 8 servers of 40 slots."""
    heat = np.random.default_rng(0).permutation(1 / np.arange(1, 257))
    return heat, torch.from_numpy(place(heat[None], Fleet.uniform(8, 40, 8)).held.copy())


Policy = Callable[[Owners, Sequence[Candidate], tuple[float, float]], Tensor]


def least_of_all(owners: Owners, servers: Sequence[Candidate], draws: tuple[float, float]) -> Tensor:
    """The owner with the least to do, in turns from `draws`."""
    count = len(servers)
    order = sorted(range(count), key=lambda row: (servers[row].cost, (row / count + draws[0]) % 1.0))
    return torch.tensor(order)[owners.owned[order].int().argmax(dim=0)]


def longest_queue(policy: Policy, owned: Tensor, heat: np.ndarray, stale: int) -> float:
    """Tokens that wait for the most loaded server, on the mean, where eight coordinators take turns to call at four
    fifths of what servers compute, and see what was waiting `stale` calls ago."""
    chances, some, count = heat / heat.sum(), Owners(owned), len(owned)
    generator, draws = np.random.default_rng(1), random.Random(1)
    queue = np.zeros(count)
    seen = [queue] * (stale + 1)
    longest = []
    for _ in range(600):
        servers = [Candidate(row, tokens) for row, tokens in enumerate(seen[-1 - stale].tolist())]
        asked = policy(some, servers, (draws.random(), draws.random())).numpy()
        queue = queue + np.bincount(asked, weights=generator.multinomial(512, chances), minlength=count)
        queue = np.maximum(queue - 512 / count / 0.8, 0.0)
        seen.append(queue)
        longest.append(queue.max())
    return float(np.mean(longest))


@pytest.mark.parametrize("stale", [8, 32])
@pytest.mark.parametrize("planned", [True, False], ids=["planned", "replicas"])
def test_coordinators_who_see_late_do_not_all_go_to_the_same_server(stale: int, planned: bool) -> None:
    heat, owned = skewed() if planned else (np.ones(256), torch.ones(8, 256, dtype=torch.bool))
    of_two, of_all = (longest_queue(policy, owned, heat, stale) for policy in (pick, least_of_all))
    print(f"\n{stale} calls late: {of_two:.0f} pairs wait for the most loaded server, else {of_all:.0f}")
    assert of_two < 0.75 * of_all


def test_servers_are_as_even_as_planned_where_nothing_is_known_of_them() -> None:
    heat, owned = skewed()
    servers, some = [Candidate(row) for row in range(8)], Owners(owned)

    def even(policy: Policy) -> float:
        shares = np.zeros(8)
        for step in range(300):
            shares += np.bincount(policy(some, servers, (step * 0.618034 % 1, 0.5)), weights=heat, minlength=8)
        return float(shares.mean() / shares.max())

    of_two, of_all = even(pick), even(least_of_all)
    print(f"\nbalancedness {of_two:.3f}, with turns of all servers {of_all:.3f}")
    assert of_two > 0.95 > of_all


@pytest.mark.parametrize(("tokens", "shares"), [(1, 1), (SHARE_TOKENS, 1), (2 * SHARE_TOKENS, 3), (10**6, 3)])
def test_a_batch_has_as_many_shares_as_copies_and_tokens_allow(tokens: int, shares: int) -> None:
    # Three copies, where the mean expert has two.
    some = owners([[1, 0], [1, 0], [1, 1]])
    found = choose(some, [Candidate(row, 7 * row) for row in range(3)], DRAWS, tokens)
    assert found.shape == (shares, 2)
    assert found[:, 1].tolist() == [2] * shares
    assert len(set(found[:, 0].tolist())) == shares


def test_whole_replicas_need_a_larger_batch_to_share_it() -> None:
    some = owners([[1, 1]] * 8)
    assert [some.count_shares(SHARE_TOKENS * times) for times in (1, 2, 7, 8, 100)] == [1, 2, 7, 8, 8]


def test_a_share_goes_elsewhere_where_its_server_has_more_than_a_share_to_do() -> None:
    for more, numbers in ((SHARE_TOKENS - 10, [2, 1]), (SHARE_TOKENS + 10, [1, 1])):
        found = choose(BOTH, (Candidate(1), Candidate(2, more)), (0.9, 0.0), 2 * SHARE_TOKENS)
        assert found.tolist() == [[number] * 3 for number in numbers]


def test_one_large_batch_is_more_even_in_shares() -> None:
    heat, owned = skewed()
    some, servers = Owners(owned), [Candidate(row) for row in range(8)]

    def even(tokens: int, first: float) -> float:
        shares = choose(some, servers, (first, 0.5), tokens).numpy()
        load = sum(np.bincount(share, weights=heat, minlength=8) for share in shares)
        return float(np.mean(load) / np.max(load))

    figures = {tokens: float(np.mean([even(tokens, step / 20) for step in range(20)])) for tokens in (64, 4096, 8192)}
    print("\nbalancedness of one call by tokens", figures)
    assert figures[64] < 0.5 < 0.6 < figures[4096] < 0.9 < figures[8192]
