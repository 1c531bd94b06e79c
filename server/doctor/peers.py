"""Checks of who trusts whom: this server's certificates, and whether other servers can be reached with them."""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertd.kernels.model.ranges import describe_experts, format_ranges
from expertd.proto import codec
from expertd.server.doctor.finding import Finding, fail, ok, warn
from expertd.server.options.config import InvalidOption, ServerConfig
from expertd.server.rpc.security import ServerSecurity

SOON = datetime.timedelta(days=30)
TIMEOUT = 5.0
"""Seconds for each question to a peer."""


def check_certificates(config: ServerConfig) -> Iterator[Finding]:
    """Whether certificate, key, authorities and tokens can be used, and for how long."""
    try:
        security = ServerSecurity(config)
    except InvalidOption as error:
        yield fail("certificates", str(error))
        return
    yield ok("certificates", f"serving with {security}")
    for option, path in (("--tls-cert", config.tls_cert), ("--tls-client-ca", config.tls_client_ca)):
        if path is not None:
            yield from _check_dates(option, path)


def _check_dates(option: str, path: Path) -> Iterator[Finding]:
    now = datetime.datetime.now(datetime.UTC)
    for position, certificate in enumerate(x509.load_pem_x509_certificates(path.read_bytes())):
        name = f"{option} {path}: {certificate.subject.rfc4514_string()}"
        end = certificate.not_valid_after_utc
        if certificate.not_valid_before_utc > now:
            yield fail(
                "certificates", f"{name} is valid only from {certificate.not_valid_before_utc}: look at the clock"
            )
        elif end < now:
            yield fail("certificates", f"{name} expired on {end}: put a new one in its place, no restart is needed")
        elif end < now + SOON:
            yield warn("certificates", f"{name} expires on {end}: put a new one in its place, no restart is needed")
        else:
            yield ok("certificates", f"{name} is valid until {end}")
        if option == "--tls-cert" and position == 0 and not _host_names(certificate):
            yield fail("certificates", f"{name} names no host in subjectAltName, so no client will accept it")


def _host_names(certificate: x509.Certificate) -> Sequence[x509.GeneralName]:
    try:
        return list(certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return ()


def check_peer(address: str, config: ServerConfig, peer_ca: Path | None, model_fingerprint: str | None) -> Finding:
    """Ask one server for its health and its shard, as a client with this server's certificate and first token."""
    try:
        with _open_channel(address, config, peer_ca) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            status = health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT).status
            if status != health_pb2.HealthCheckResponse.SERVING:
                return warn("peers", f"{address} is reached but not serving: it loads or drains; look at its log")
            ask = channel.unary_unary(
                f"/{codec.SERVICE}/GetShard", codec.ShardRequest.SerializeToString, codec.ShardResponse.FromString
            )
            shard = codec.decode_shard(ask(codec.ShardRequest(), timeout=TIMEOUT, metadata=_token(config)))
    except grpc.RpcError as error:
        return fail("peers", f"{address}: {error.code().name}: {error.details()}: {_advice(error)}")
    except OSError as error:
        return fail("peers", f"{error.filename} cannot be read: {error.strerror}")
    if model_fingerprint is not None and shard.model_fingerprint != model_fingerprint:
        return fail(
            "peers", f"{address} holds another model, {shard.model_fingerprint!r}: compare --model here and there"
        )
    return ok(
        "peers",
        f"{address} serves experts {describe_experts(shard.experts)} of layers {format_ranges(shard.layers)}"
        f" with {shard.backend} on {shard.device}, version {shard.version}",
    )


def _open_channel(address: str, config: ServerConfig, peer_ca: Path | None) -> grpc.Channel:
    authorities = peer_ca or config.tls_client_ca
    if authorities is None:
        return grpc.insecure_channel(address)
    own: tuple[bytes | None, bytes | None] = (None, None)
    if config.tls_key is not None and config.tls_cert is not None:
        own = (config.tls_key.read_bytes(), config.tls_cert.read_bytes())
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authorities.read_bytes(), *own))


def _token(config: ServerConfig) -> tuple[tuple[str, str], ...]:
    if config.auth_token_file is None:
        return ()
    return (("authorization", f"Bearer {config.auth_token_file.read_text().split()[0]}"),)


def _advice(error: grpc.RpcError) -> str:
    code = error.code()
    if "http1.x server" in str(error.details()):
        return "HTTP is spoken there, as on a metrics port: give the address of its --listen"
    if code == grpc.StatusCode.UNAUTHENTICATED:
        return "the servers' --auth-token-file must have a token in common"
    if code == grpc.StatusCode.UNAVAILABLE:
        return "is it started there, does a firewall let this port pass, do both sides have TLS (--peer-ca) or neither?"
    return "is it an expertd server, and not overloaded?"
