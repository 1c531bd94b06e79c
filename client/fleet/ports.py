"""Servers as commands are told of them: by their gRPC port or by their metrics port, each of which tells the other."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import urllib.request
from collections.abc import Sequence
from http.client import HTTPException
from typing import Any

from expertd.client.transport.address import check_address
from expertd.client.transport.security import ClientSecurity
from expertd.proto.base.errors import Unavailable
from expertd.proto.base.loopback import UNIX

EITHER_PORT = "host:port of their --listen or --metrics, or unix:PATH"
TIMEOUT = 3.0


class NoMetricsPort(OSError):
    """What answers there is no metrics port, or nothing does."""


class NoHttp(NoMetricsPort):
    """Something answers there, but not over HTTP: a gRPC port, for one."""


async def grpc_addresses(addresses: Sequence[str]) -> list[str]:
    """The gRPC address of each. Raises `ValueError` for what is no address."""
    return list(await asyncio.gather(*(asyncio.to_thread(_grpc_address, one) for one in addresses)))


async def metrics_addresses(addresses: Sequence[str], security: ClientSecurity) -> list[str]:
    """The metrics address of each; what was given, where the server does not tell.

    Raises `ValueError` for what is no address, `ExpertdError` for a gRPC port that does not let this caller in.
    """
    return list(await asyncio.gather(*(_metrics_address(one, security) for one in addresses)))


def read_status(address: str) -> dict[str, Any]:
    """What a metrics port tells of its server. Raises `NoMetricsPort` with the reason."""
    # Whatever proxies there are, they are not for servers.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{address}/status.json", timeout=TIMEOUT) as answer:
            status: dict[str, Any] = json.load(answer)
            return status
    except HTTPException:
        raise NoHttp("no HTTP is spoken there; give the address of its --metrics") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise NoMetricsPort(getattr(reason, "strerror", None) or str(reason)) from None


def speaks_http(address: str) -> bool:
    """Whether it is a metrics port."""
    try:
        return not address.startswith(UNIX) and bool(read_status(address))
    except NoMetricsPort:
        return False


def seconds(text: str) -> float:
    """A time to wait, as options have it."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a time; it must be greater than 0")
    return value


def explained(reason: object, security: ClientSecurity) -> str:
    """Why a server does not answer, with the option that may mend it."""
    said = str(reason)
    if "authorization is missing" in said:
        return f"{said}: give --auth-token-file"
    if "http1.x server" in said:
        return f"{said.partition(':')[0]}: that is no gRPC port; give the address of its --listen"
    if "Socket closed" in said and security.root_ca is None:
        return f"{said}: a server with TLS needs --tls-ca"
    if "WRONG_VERSION_NUMBER" in said:
        return f"{said}: a server without TLS needs no --tls-ca"
    return said


def port_at(told: str, given: str) -> str:
    """A server knows its port; which of its addresses can be reached from here is known by who gave one."""
    return told if given.startswith(UNIX) else f"{given.rpartition(':')[0]}:{told.rpartition(':')[2]}"


def _grpc_address(address: str) -> str:
    check_address("ADDRESS", address)
    if address.startswith(UNIX):
        return address
    try:
        told = str(read_status(address)["address"])
    except (NoMetricsPort, KeyError):
        return address
    return port_at(told, address)


async def _metrics_address(address: str, security: ClientSecurity) -> str:
    check_address("ADDRESS", address)
    if not address.startswith(UNIX):
        try:
            await asyncio.to_thread(read_status, address)
        except NoHttp:
            pass
        except NoMetricsPort:
            return address
        else:
            return address
    # It imports torch, which takes seconds.
    from expertd.client.transport.grpc_streams import GrpcTransport

    transport = GrpcTransport(address, security=security)
    try:
        told = (await transport.get_shard(TIMEOUT)).metrics_address
    except Unavailable:
        return address
    finally:
        await transport.close()
    return port_at(told, address) if told else address
