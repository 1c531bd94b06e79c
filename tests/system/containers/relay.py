"""A relay that makes a connection long: what it passes on arrives late, in order.

    python -m tests.system.containers.relay 127.0.0.1:0 10.0.0.2:50051 --delay 0.04 --jitter 0.02

prints its address when it listens and runs until it is ended.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random

CHUNK = 65536


async def _pass_on(source: asyncio.StreamReader, sink: asyncio.StreamWriter, delay: float, jitter: float) -> None:
    """Each piece `delay` to `delay + jitter` seconds late, and the end as well."""
    loop, due = asyncio.get_running_loop(), 0.0
    # A connection that is reset ends for both sides.
    with contextlib.suppress(ConnectionError):
        while piece := await source.read(CHUNK):
            # Never before what was read earlier.
            due = max(due + 1e-6, loop.time() + delay + random.uniform(0.0, jitter))
            loop.call_at(due, sink.write, piece)
    loop.call_at(max(due + 1e-6, loop.time() + delay), sink.close)


async def relay(listen: str, target: str, delay: float, jitter: float) -> None:
    """Relay every connection to `listen` to `target`, until cancelled."""

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = target.rpartition(":")
        try:
            other_reader, other_writer = await asyncio.open_connection(host, int(port))
        except OSError:
            writer.close()
            return
        await asyncio.gather(
            _pass_on(reader, other_writer, delay, jitter), _pass_on(other_reader, writer, delay, jitter)
        )

    host, _, port = listen.rpartition(":")
    async with await asyncio.start_server(accept, host, int(port)) as server:
        print("{}:{}".format(*server.sockets[0].getsockname()), flush=True)
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("listen", metavar="HOST:PORT")
    parser.add_argument("target", metavar="HOST:PORT")
    parser.add_argument("--delay", type=float, required=True, help="seconds")
    parser.add_argument("--jitter", type=float, default=0.0, help="seconds at most on top")
    arguments = parser.parse_args()
    asyncio.run(relay(arguments.listen, arguments.target, arguments.delay, arguments.jitter))
