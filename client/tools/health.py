"""`expertd health`: ask a server whether it serves; for container health checks and probes, so it starts quickly."""

from __future__ import annotations

import argparse
import asyncio
import sys
import urllib.error
import urllib.request
from http.client import HTTPException

from expertd.client.fleet.ports import explained, seconds, speaks_http
from expertd.client.transport.address import check_address
from expertd.client.transport.health import ask_health
from expertd.client.transport.security import add_security_arguments, security_from


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "address",
        metavar="ADDRESS",
        help="host:port of the server's --listen or --metrics, unix:PATH, or http://host:port/readyz of the latter",
    )
    parser.add_argument(
        "--timeout", type=seconds, default=4.0, metavar="SECONDS", help="to wait for the answer (default: 4)"
    )
    add_security_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """0 when the server is SERVING or ready, 1 when it is not or cannot be reached, 2 for unusable options."""
    address = arguments.address
    if address.startswith("http://"):
        bare = address.rstrip("/")
        return _tell_page(address if bare.count("/") > 2 else f"{bare}/readyz", arguments)
    try:
        security = security_from(arguments)
        status = asyncio.run(ask_health(check_address("ADDRESS", address), security, arguments.timeout))
    except ValueError as error:
        print(f"expertd health: error: {error}", file=sys.stderr)
        return 2
    if status.startswith(("UNAVAILABLE", "DEADLINE_EXCEEDED")) and speaks_http(address):
        return _tell_page(f"http://{address}/readyz", arguments)
    print(f"{address}: {explained(status, security)}")
    return 0 if status == "SERVING" else 1


def _tell_page(url: str, arguments: argparse.Namespace) -> int:
    well, answer = _get(url, arguments.timeout)
    print(f"{arguments.address}: {answer}")
    return 0 if well else 1


def _get(url: str, timeout: float) -> tuple[bool, str]:
    """Whether the page says so, and its text or why there is none."""
    # Whatever proxies there are, they are not for servers.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout) as page:
            return True, str(page.read(), "utf-8").strip()
    except urllib.error.HTTPError as error:
        with error:
            return False, str(error.read(), "utf-8").strip()
    except (OSError, HTTPException) as error:
        return False, str(error)
