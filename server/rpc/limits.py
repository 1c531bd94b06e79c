"""How gRPC is to serve callers, in a server as in its front ends."""

from __future__ import annotations

from expertd.server.options.config import ServerConfig

WINDOW_BYTES = 1 << 20
"""Received by gRPC ahead of the handlers, for each stream; a message that is waited for may be larger."""


def server_options(
    config: ServerConfig, max_message_bytes: int, max_streams: int, *, share_port: bool = False
) -> list[tuple[str, int]]:
    """Options of a `grpc.aio.server`: at most `max_streams` on a connection; one that may `share_port` with others."""
    return [
        # Beside those of callers, a server's front ends have one each.
        ("grpc.max_allowed_incoming_connections", config.max_connections + (0 if share_port else config.front_ends)),
        ("grpc.max_concurrent_streams", max_streams),
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        # Of what nobody has read yet, each stream may send so much; gRPC's own estimate allows 16 MiB and more.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        # Clients find out in seconds that a server is cut off; a ping costs nothing.
        ("grpc.http2.min_ping_interval_without_data_ms", 1000),
        # Without it a second server on the same port would silently share its calls.
        ("grpc.so_reuseport", int(share_port)),
    ]
