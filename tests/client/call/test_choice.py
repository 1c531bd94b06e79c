"""The choice of owners, from snapshots."""

import pytest
import torch

from expertd.client.call.choice import ELSEWHERE, NOBODY, Candidate, candidates, choose
from expertd.client.fleet.member import Member
from expertd.client.transport.grpc_streams import GrpcTransport

BOTH = torch.ones(2, 3, dtype=torch.bool)


def chosen(first: Candidate, second: Candidate, avoid: int | None = None) -> int:
    """Which of two owners of the same experts is asked."""
    (number,) = set(choose(BOTH, (first, second), avoid).tolist())
    return int(number)


def test_every_expert_has_the_owner_with_the_least_to_do() -> None:
    owned = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0]]).bool()
    servers = (Candidate(7, 90), Candidate(8, 20), Candidate(9, 10))
    owners = choose(owned, servers)
    assert owners.tolist() == [7, 9, 9, NOBODY]
    assert owners.dtype == torch.int64


def test_nobody_is_chosen_where_nobody_in_use_owns() -> None:
    assert choose(BOTH, (Candidate(1, in_use=False), Candidate(2, in_use=False))).tolist() == [NOBODY] * 3
    assert choose(BOTH[:0], ()).tolist() == [NOBODY] * 3
    owned = torch.tensor([[1, 0], [0, 1]]).bool()
    assert choose(owned, (Candidate(1, in_use=False), Candidate(2))).tolist() == [NOBODY, 2]


@pytest.mark.parametrize(
    "reluctant", [Candidate(1, busy=True), Candidate(1, slow=True), Candidate(1, elsewhere=True), Candidate(1)]
)
def test_one_that_is_busy_elsewhere_or_to_be_avoided_is_asked_only_in_need(reluctant: Candidate) -> None:
    avoid = 1 if reluctant == Candidate(1) else None
    other = Candidate(2, 4000, turn=0.9)
    assert chosen(reluctant, other, avoid) == chosen(other, reluctant, avoid) == 2
    assert chosen(reluctant, Candidate(2, in_use=False), avoid) == 1


def test_another_locality_is_asked_once_much_more_is_outstanding_here() -> None:
    assert chosen(Candidate(1, elsewhere=True), Candidate(2, ELSEWHERE - 1)) == 2
    assert chosen(Candidate(1, elsewhere=True), Candidate(2, ELSEWHERE + 1)) == 1
    assert chosen(Candidate(1, 50, elsewhere=True), Candidate(2, 40, elsewhere=True)) == 2


def test_no_number_of_tokens_makes_a_busy_or_avoided_server_the_better_one() -> None:
    assert chosen(Candidate(1, busy=True), Candidate(2, 10**15)) == 2
    assert chosen(Candidate(1), Candidate(2, 10**15, elsewhere=True), avoid=1) == 2
    # Of two in need the one with one reason against it, then the one with less to do.
    assert chosen(Candidate(1, busy=True), Candidate(2, 10**6, busy=True), avoid=1) == 2
    assert chosen(Candidate(1, 50), Candidate(2, 40, busy=True), avoid=1) == 2


def test_turns_decide_between_servers_with_as_much_to_do_and_no_others() -> None:
    assert chosen(Candidate(1, 5, turn=0.75), Candidate(2, 5, turn=0.25)) == 2
    assert chosen(Candidate(1, 5, turn=0.25), Candidate(2, 5, turn=0.75)) == 1
    assert chosen(Candidate(1, 5, turn=0.75), Candidate(2, 6, turn=0.25)) == 1


async def test_coordinators_break_ties_differently_and_every_server_has_its_share() -> None:
    members = [Member(number, GrpcTransport("127.0.0.1:1")) for number in (3, 4)]
    for member in members:
        member.in_use = True
    firsts = [coordinator / 10 for coordinator in range(10)]
    asked = [int(choose(BOTH, candidates(members, "", first, now=0.0))[0]) for first in firsts]
    assert (asked.count(3), asked.count(4)) == (5, 5)


async def test_a_snapshot_says_who_is_busy_and_how_much_is_outstanding() -> None:
    members = [Member(number, GrpcTransport("127.0.0.1:1")) for number in (3, 4)]
    members[0].busy_until, members[0].outstanding_tokens = 10.0, 50
    members[1].in_use = True
    before, after = (candidates(members, "", 0.25, now) for now in (9.9, 10.0))
    assert before == (Candidate(3, 50, in_use=False, busy=True, turn=0.25), Candidate(4, turn=0.75))
    assert after[0] == Candidate(3, 50, in_use=False, turn=0.25)


def test_what_a_slower_server_has_to_do_weighs_more() -> None:
    assert chosen(Candidate(1, 40, weight=2.0), Candidate(2, 60)) == 2
    assert chosen(Candidate(1, 20, weight=2.0), Candidate(2, 60)) == 1
    assert chosen(Candidate(1, weight=2.5, turn=0.0), Candidate(2, turn=0.9)) == 2
