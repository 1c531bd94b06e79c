"""How gRPC is to serve callers and front ends."""

from __future__ import annotations

from expertd.server.options.config import ServerConfig

WINDOW_BYTES = 1 << 20
"""Received by gRPC ahead of the handlers, for each stream; a message that is waited for may be larger."""

MAX_INT = 2**31 - 1
UNLIMITED = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
"""Options of a front end's channel to its server, which has limits of its own."""


def server_options(config: ServerConfig, max_message_bytes: int, *, front_end: bool = False) -> list[tuple[str, int]]:
    """Options of the `grpc.aio.server` of a server or of one of its front ends."""
    behind = 0 if front_end else config.front_ends
    return [
        # Beside those of callers, a server's front ends have one each.
        ("grpc.max_allowed_incoming_connections", config.max_connections + behind),
        # What all callers of a front end ask of the server comes over one connection.
        ("grpc.max_concurrent_streams", MAX_INT if behind else config.max_streams),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # Of what nobody has read yet, each stream may send so much; gRPC's own estimate allows 16 MiB and more.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        # Clients find out in seconds that a server is cut off; a ping costs nothing.
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        # With it a second server on the same port would silently share its calls.
        ("grpc.so_reuseport", int(front_end)),
    ]
