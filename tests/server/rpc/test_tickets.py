"""Who is let in to share memory."""

import socket

import pytest

from expertd.proto.base.errors import NotPermitted, Unauthenticated
from expertd.proto.lane.frames import check_peer
from expertd.server.rpc.tickets import MAX_TICKETS, Tickets, is_here


def test_tickets_are_for_callers_on_this_machine_and_wear_off(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("expertd.server.rpc.tickets.time.monotonic", lambda: now)
    tickets = Tickets("@name")
    old = tickets.issue("ipv4:127.0.0.1:1").ticket
    assert tickets.redeem(tickets.issue("unix:").ticket) == "unix:"
    with pytest.raises(NotPermitted, match=r"ipv4:192\.0\.2\.1:5 is not on this server's machine"):
        tickets.issue("ipv4:192.0.2.1:5")
    now += 11
    with pytest.raises(Unauthenticated, match="too old"):
        tickets.redeem(old)
    for _ in range(MAX_TICKETS):
        tickets.issue("unix:")
    with pytest.raises(NotPermitted, match=f"{MAX_TICKETS} tickets wait to be used"):
        tickets.issue("unix:")
    with pytest.raises(NotPermitted, match="start it with --shared-memory-bytes above 0"):
        Tickets(None).issue("unix:")


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
