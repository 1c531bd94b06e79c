"""Where a coordinator's servers are: a list, a DNS name with many addresses, or a file that is watched."""

from __future__ import annotations

import asyncio
import math
import socket
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from expertd.client.transport.address import check_address
from expertd.kernels.weights.files import check_path


class Discovery(Protocol):
    """Looked at when a coordinator connects and from time to time from then on; servers may come and go."""

    @property
    def seconds(self) -> float:
        """Between two looks."""

    async def addresses(self) -> tuple[str, ...]:
        """The servers of now, as `host:port`. Raises `OSError` or `ValueError`; the former servers then remain."""


@dataclass(frozen=True, slots=True)
class StaticServers:
    """A list that never changes."""

    servers: tuple[str, ...]
    seconds: float = math.inf

    def __repr__(self) -> str:
        return repr(list(self.servers))

    async def addresses(self) -> tuple[str, ...]:
        return self.servers


@dataclass(frozen=True, slots=True)
class DnsServers:
    """Every address of a name, such as a headless Kubernetes service. With TLS, `ClientSecurity.server_name` is the
    name in the servers' certificates: they are dialled by address."""

    host: str
    port: int
    seconds: float = 5.0

    async def addresses(self) -> tuple[str, ...]:
        """The addresses of the name now, each once, as `host:port`. Raises `OSError` when it cannot be resolved."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        hosts = sorted({str(address[0]) for *_, address in found})
        return tuple(f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}" for host in hosts)


@dataclass(frozen=True, slots=True)
class FileServers:
    """One `host:port` or `unix:PATH` a line; what follows a # is a remark. Replace the file as a whole (rename)."""

    path: Path
    seconds: float = 1.0

    def __post_init__(self) -> None:
        check_path("path", self.path)

    async def addresses(self) -> tuple[str, ...]:
        """What the file holds now. Raises `OSError` when it cannot be read, `ValueError` for what is no address."""
        lines = (line.partition("#")[0].strip() for line in self.path.read_text().splitlines())
        servers = tuple(dict.fromkeys(line for line in lines if line))
        if not servers:
            raise ValueError(f"{self.path} names no server; write one host:port a line")
        return tuple(check_address(str(self.path), server) for server in servers)


def as_discovery(servers: Iterable[str] | Discovery) -> Discovery:
    """A list of addresses, or what finds them. Raises `ValueError` or `TypeError` for what is neither."""
    if isinstance(servers, str | bytes | Path) or (isinstance(servers, Sized) and not servers):
        raise ValueError(f"servers is {servers!r}; give a list with at least one host:port")
    if isinstance(servers, Iterable):
        return StaticServers(tuple(dict.fromkeys(check_address("servers", server) for server in servers)))
    if not hasattr(servers, "addresses"):
        raise TypeError(f"servers is {servers!r}; give a list of host:port, DnsServers or FileServers")
    return servers
