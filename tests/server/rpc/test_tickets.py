"""Who is let in to share memory."""

import socket

import pytest

from expertd.proto.base.errors import NotPermitted, Unauthenticated
from expertd.proto.base.loopback import is_here
from expertd.proto.lane.frames import check_peer
from expertd.server.rpc.tickets import MAX_PEER_TICKETS, MAX_TICKETS, Tickets


def test_tickets_are_for_callers_on_this_machine_and_wear_off() -> None:
    now = 1000.0
    tickets = Tickets("@name", clock=lambda: now)
    old = tickets.issue("ipv4:127.0.0.1:1").ticket
    assert tickets.redeem(tickets.issue("unix:").ticket).peer == "unix:"
    with pytest.raises(NotPermitted, match=r"ipv4:192\.0\.2\.1:5 is not on this server's machine"):
        tickets.issue("ipv4:192.0.2.1:5")
    now += 11
    with pytest.raises(Unauthenticated, match="too old"):
        tickets.redeem(old)
    with pytest.raises(NotPermitted, match="start it with --shared-memory-bytes above 0"):
        Tickets(None).issue("unix:")


def test_the_log_says_once_of_a_host_why_no_memory_is_shared_with_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    tickets = Tickets("@name")
    for peer in ("ipv4:192.0.2.1:5", "ipv4:192.0.2.1:6", "ipv4:198.51.100.7:5"):
        with pytest.raises(NotPermitted):
            tickets.issue(peer)
    assert caplog.text.count("no memory is shared, calls come over gRPC: ipv4:192.0.2.1:5 is not on") == 1
    assert caplog.text.count("no memory is shared") == 2
    assert "--unix-socket in a volume of both" in caplog.text


def test_whoever_takes_all_tickets_keeps_nobody_out() -> None:
    tickets = Tickets("@name")
    modest = tickets.issue("ipv4:127.0.0.1:1", "token").ticket
    greedy = [tickets.issue("ipv4:127.0.0.1:2").ticket for _ in range(MAX_TICKETS)]
    with pytest.raises(Unauthenticated, match="too old"):
        tickets.redeem(greedy[-MAX_PEER_TICKETS - 1])
    tickets.redeem(greedy[-MAX_PEER_TICKETS])
    crowd = [tickets.issue(f"ipv4:127.0.0.1:{3 + number // 16}").ticket for number in range(MAX_TICKETS)]
    later = tickets.issue("ipv4:127.0.0.1:9").ticket
    for ticket in (modest, later, *greedy[-MAX_PEER_TICKETS + 1 :], *crowd[-16:]):
        tickets.redeem(ticket)


def test_whoever_asks_over_a_unix_socket_keeps_none_of_the_others_there_out() -> None:
    tickets = Tickets("@name")
    unproven = tickets.issue("unix:").ticket
    for _ in range(MAX_TICKETS - 1):
        tickets.issue("unix:")
    tickets.redeem(unproven)
    proven = tickets.issue("unix:", "token").ticket
    for _ in range(2 * MAX_TICKETS):
        tickets.issue("unix:", "another token")
    tickets.redeem(proven)


@pytest.mark.parametrize(
    ("peer", "here"),
    [
        ("unix:", True),
        ("unix:/run/x.sock", True),
        ("ipv4:127.0.0.1:50", True),
        ("ipv6:%5B::1%5D:50", True),
        ("ipv4:192.0.2.1:50", False),
        ("ipv6:%5B2001:db8::1%5D:50", False),
        ("ipv6:%5Bfe80::1%25eth0%5D:50", False),
        ("", False),
        ("vsock:3:50", False),
    ],
)
def test_who_is_here(peer: str, here: bool) -> None:
    assert is_here(peer) == here


def test_the_peer_of_a_socket_pair_is_this_process() -> None:
    one, other = socket.socketpair()
    with one, other:
        check_peer(one)


def test_a_caller_says_whose_memory_it_hands_over() -> None:
    tickets = Tickets("@name", "GPU-own")
    for gpu, of_peer in (("", False), ("GPU-own", False), ("GPU-other", True)):
        assert tickets.redeem(tickets.issue("unix:", gpu=gpu).ticket).of_peer == of_peer
