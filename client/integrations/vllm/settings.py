"""What the plug-in is told: by the environment, or by vLLM's `--additional-config '{"expertd": {...}}'`, which wins."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.fleet.discovery import Discovery, DnsServers, FileServers, as_discovery
from expertd.client.transport.security import ClientSecurity

SECTION = "expertd"
"""Of vLLM's additional configuration."""
PREFIX = "EXPERTD_"
"""Of the environment's variables; the rest is a name below, in capitals."""
WAIT_SECONDS = 600.0
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float8_e4m3fn": torch.float8_e4m3fn}


@dataclass(frozen=True, slots=True)
class Settings:
    servers: Discovery
    config: CoordinatorConfig
    wait: float
    """Seconds until every expert must have an owner when an engine starts."""


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"{name!r} is no dtype; choose from {', '.join(DTYPES)}")
    return DTYPES[name]


def _servers(text: str) -> Discovery:
    """`host:port,host:port`, `dns:host:port` or `file:PATH`."""
    kind, _, rest = text.partition(":")
    if kind == "file":
        return FileServers(Path(rest))
    if kind == "dns":
        host, _, port = rest.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"{text!r} names no host and port; write dns:host:port")
        return DnsServers(host, int(port))
    return as_discovery([server.strip() for server in text.split(",") if server.strip()])


_OF_CALLS: dict[str, Callable[[str], Any]] = {
    "hidden_dtype": _dtype,
    "reply_dtype": _dtype,
    "call_timeout": float,
    "attempt_timeout": float,
    "hedge_quantile": float,
    "locality": str,
    "model_fingerprint": str,
}
"""Fields of `CoordinatorConfig`."""
_OF_SECURITY: dict[str, Callable[[str], Any]] = {
    "root_ca": Path,
    "client_cert": Path,
    "client_key": Path,
    "token_file": Path,
    "server_name": str,
}
"""Fields of `ClientSecurity`."""
NAMES = ("servers", "wait", *_OF_CALLS, *_OF_SECURITY)


def read(additional: object, environment: Mapping[str, str] | None = None) -> Settings | None:
    """What `additional`, vLLM's additional configuration, and the environment say; None where no servers are named.

    Raises `ValueError` naming what is wrong.
    """
    given = _given(additional, os.environ if environment is None else environment)
    if "servers" not in given:
        return None
    calls = {name: _parsed(name, given[name], parse) for name, parse in _OF_CALLS.items() if name in given}
    security = {name: _parsed(name, given[name], parse) for name, parse in _OF_SECURITY.items() if name in given}
    return Settings(
        servers=_parsed("servers", given["servers"], _servers),
        config=CoordinatorConfig(
            output_dtype=torch.float32, security=ClientSecurity(**security) if security else None, **calls
        ),
        wait=_parsed("wait", given.get("wait", str(WAIT_SECONDS)), float),
    )


def _given(additional: object, environment: Mapping[str, str]) -> dict[str, str]:
    given = {name: environment[PREFIX + name.upper()] for name in NAMES if environment.get(PREFIX + name.upper())}
    section = additional.get(SECTION, {}) if isinstance(additional, Mapping) else {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{SECTION} in vLLM's additional configuration is {section!r}; give an object")
    for name, value in section.items():
        if name not in NAMES:
            raise ValueError(
                f"{SECTION}.{name} in vLLM's additional configuration is unknown; choose from {', '.join(NAMES)}"
            )
        given[name] = ",".join(value) if isinstance(value, list) else str(value)
    return given


def _parsed(name: str, text: str, parse: Callable[[str], Any]) -> Any:  # noqa: ANN401
    try:
        return parse(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} ({PREFIX}{name.upper()}, or {SECTION}.{name}): {error}") from None
