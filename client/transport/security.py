"""How a client proves who it is and knows whom it talks to."""

from __future__ import annotations

import argparse
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from expertd.proto.base.certificates import ends_of
from expertd.proto.base.errors import Unauthenticated
from expertd.proto.base.files import Stamp, stamp_of
from expertd.proto.base.loopback import UNIX, stays_here


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientSecurity:
    """Credentials for every server of a coordinator. Raises `ValueError` for what cannot be used.

    `ClientSecurity()` is plaintext without a token. Certificates are read when a channel is opened, and again before
    the next attempt to reach a server that was lost; the token file when a call or stream is opened.
    """

    root_ca: Path | None = None
    """PEM file of the authorities that sign servers' certificates; with it connections are TLS."""
    client_cert: Path | None = None
    """PEM file of this client's certificate chain, for servers with --tls-client-ca."""
    client_key: Path | None = None
    """PEM file of its private key, not encrypted."""
    token: str | None = field(default=None, repr=False)
    """Bearer token, for servers with --auth-token-file."""
    token_file: Path | None = None
    """File whose first line is the token."""
    server_name: str | None = None
    """Name to expect in servers' certificates instead of the host that is dialled: for tests and tunnels."""
    insecure: bool = False
    """Send the token in plaintext beyond this machine too: for networks that encrypt by themselves."""

    def __post_init__(self) -> None:
        if (self.client_cert is None) != (self.client_key is None):
            raise ValueError("client_cert and client_key belong together; give both or neither")
        for name in ("client_cert", "server_name"):
            if self.root_ca is None and getattr(self, name) is not None:
                raise ValueError(f"{name} needs TLS; give root_ca too")
        if self.token is not None and self.token_file is not None:
            raise ValueError("token and token_file are both given; give one")
        if self.token is not None:
            _check_token("token", self.token)

    def encrypts(self, address: str) -> bool:
        """Whether connections to `address` are TLS."""
        return self.root_ca is not None and not address.startswith(UNIX)

    def open_channel(self, address: str, options: Sequence[tuple[str, int | str]]) -> grpc.aio.Channel:
        """A channel to `address` (host:port, or unix:PATH, which is never TLS) with these credentials."""
        if self.encrypts(address):
            name = [("grpc.ssl_target_name_override", self.server_name)] if self.server_name else []
            return grpc.aio.secure_channel(address, self._credentials(), options=[*options, *name])
        has_token = self.token is not None or self.token_file is not None
        if has_token and not self.insecure and not stays_here(address):
            raise ValueError(f"the token would cross the network to {address} in plaintext; give root_ca, or insecure")
        return grpc.aio.insecure_channel(address, options=list(options))

    def stamp(self) -> Stamp | None:
        """Of the files of certificates."""
        return stamp_of(path for path in (self.root_ca, self.client_cert, self.client_key) if path is not None)

    def certificate_ends(self) -> dict[str, float]:
        """Field -> the Unix time from which on a certificate in its file, as it is now, is not valid."""
        return ends_of({"root_ca": self.root_ca, "client_cert": self.client_cert})

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What each call but health checks must carry. Raises `Unauthenticated` for an unusable token file."""
        token = self.token
        if self.token_file is not None:
            try:
                token = _read("token_file", self.token_file).decode(errors="replace").split("\n")[0].strip()
                _check_token(f"token_file {self.token_file}", token)
            except ValueError as error:
                raise Unauthenticated(str(error)) from None
        return () if token is None else (("authorization", f"Bearer {token}"),)

    def _credentials(self) -> grpc.ChannelCredentials:
        # gRPC would take what is no certificate and fail later, at every connection, without naming the file.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        authorities = _read("root_ca", self.root_ca)
        try:
            context.load_verify_locations(cadata=authorities.decode(errors="replace"))
        except (OSError, ValueError) as error:
            raise ValueError(f"root_ca {self.root_ca} is not a PEM file of certificates: {error}") from None
        if self.client_cert is None:
            return grpc.ssl_channel_credentials(authorities)
        certificate, key = _read("client_cert", self.client_cert), _read("client_key", self.client_key)
        try:
            context.load_cert_chain(self.client_cert, self.client_key, password="")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"client_cert {self.client_cert} and client_key {self.client_key} are not a PEM certificate with its"
                f" unencrypted key: {error}"
            ) from None
        return grpc.ssl_channel_credentials(authorities, key, certificate)


def _read(name: str, path: Path | None) -> bytes:
    try:
        return Path(path or "").read_bytes()
    except OSError as error:
        raise ValueError(f"{name} {path} cannot be read: {error.strerror}") from None


def _check_token(name: str, token: str) -> None:
    if not (token.isascii() and token.isprintable() and token.split() == [token]):
        raise ValueError(f"{name} is empty or has spaces or characters that are not printable ASCII")


def add_security_arguments(parser: argparse.ArgumentParser) -> None:
    """Options for `security_from`."""
    parser.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="PEM file of the authorities that sign servers' certificates"
    )
    parser.add_argument(
        "--tls-client-cert",
        type=Path,
        metavar="FILE",
        help="PEM file of a client's certificate chain, for --tls-client-ca",
    )
    parser.add_argument("--tls-client-key", type=Path, metavar="FILE", help="PEM file of its private key")
    parser.add_argument(
        "--server-name", metavar="NAME", help="name in servers' certificates, where it is not the host that is asked"
    )
    parser.add_argument(
        "--auth-token-file", type=Path, metavar="FILE", help="file whose first line is a bearer token for the servers"
    )
    parser.add_argument("--insecure", action="store_true", help="send the token in plaintext beyond this machine too")


def security_from(arguments: argparse.Namespace) -> ClientSecurity:
    """The credentials of `add_security_arguments`. Raises `ValueError` for what cannot be used."""
    return ClientSecurity(
        root_ca=arguments.tls_ca,
        client_cert=arguments.tls_client_cert,
        client_key=arguments.tls_client_key,
        server_name=arguments.server_name,
        token_file=arguments.auth_token_file,
        insecure=arguments.insecure,
    )
