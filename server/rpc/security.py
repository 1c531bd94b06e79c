"""Who may call this server: TLS, callers' certificates, bearer tokens; files are read again when they change."""

from __future__ import annotations

import hmac
import logging
import math
import os
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeAlias, TypeVar

import grpc
import grpc.aio

from expertd.proto.base.certificates import ends_of
from expertd.proto.base.errors import Unauthenticated
from expertd.proto.base.files import stamp_of
from expertd.proto.base.loopback import UNIX, is_loopback
from expertd.server.options.config import Address, InvalidOption, ServerConfig
from expertd.server.rpc.health import SERVICE as HEALTH
from expertd.server.rpc.identity import Identities

log = logging.getLogger(__name__)
T = TypeVar("T")
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
Details: TypeAlias = grpc.HandlerCallDetails
Next: TypeAlias = "Callable[[Details], Awaitable[Handler | None]]"
RETRY_SECONDS = 1.0
"""Between two looks at files that could not be used."""
OPEN_TO_ALL = f"/{HEALTH}/"
MISSING = "authorization is missing; send the metadata 'authorization: Bearer TOKEN' with a token of this server"
WRONG = "authorization holds no bearer token that this server accepts; ask its operator for a current one"


class WatchedFiles(Generic[T]):
    """What `read` makes of some files, made again when they change. Callable from any thread."""

    def __init__(self, paths: tuple[Path, ...], read: Callable[[], T], on_failure: Callable[[], object]) -> None:
        """Reads at once: `read` raises `InvalidOption` for files that cannot be used; later `on_failure` is called."""
        self._paths = paths
        self._read = read
        self._on_failure = on_failure
        self._lock = threading.Lock()
        self._tried = stamp_of(paths)
        self._again_at = math.inf
        self._complaint = ""
        self.value = read()

    def refresh(self) -> bool:
        """Read again if a file changed or could not be used; whether `value` is new.

        Unusable files leave it, are tried again, and are logged when there is something new to say of them.
        """
        with self._lock:
            stamp, now = stamp_of(self._paths), time.monotonic()
            if stamp == self._tried and now < self._again_at:
                return False
            self._tried, self._again_at = stamp, now + RETRY_SECONDS
            names = ", ".join(map(str, self._paths))
            try:
                self.value = self._read()
            except InvalidOption as error:
                self._on_failure()
                if str(error) != self._complaint:
                    self._complaint = str(error)
                    log.error("%s changed but cannot be used, the former content stays in force: %s", names, error)
                return False
            self._again_at, self._complaint = math.inf, ""
            log.info("read %s again", names)
            return True


class BearerTokens(grpc.aio.ServerInterceptor):
    """Lets calls pass that carry one of the tokens in a file; health checks need none."""

    def __init__(self, path: Path, on_failure: Callable[[], object]) -> None:
        self._tokens = WatchedFiles((path,), lambda: _read_tokens(path), on_failure)
        self._refusals = {reason: _refusal(Unauthenticated(reason)) for reason in (MISSING, WRONG)}

    async def intercept_service(self, continuation: Next, handler_call_details: Details) -> Handler | None:
        if handler_call_details.method.startswith(OPEN_TO_ALL):
            return await continuation(handler_call_details)
        given = [value for key, value in handler_call_details.invocation_metadata if key == "authorization"]
        if not given:
            return self._refusals[MISSING]
        if not all(self._accepts(value) for value in given):
            return self._refusals[WRONG]
        return await continuation(handler_call_details)

    def _accepts(self, value: str | bytes) -> bool:
        self._tokens.refresh()
        scheme, _, token = (value.encode() if isinstance(value, str) else value).partition(b" ")
        # A list, not a generator: the time must not tell which token came close.
        matches = [hmac.compare_digest(token.strip(), known) for known in self._tokens.value]
        return scheme.lower() == b"bearer" and any(matches)


class ServerSecurity:
    """The security options of one server. Raises `InvalidOption` for files that cannot be used."""

    def __init__(self, config: ServerConfig, on_failure: Callable[[], object] = lambda: None) -> None:
        """`on_failure` is called whenever a file that changed cannot be used."""
        self._config = config
        if config.insecure and not is_loopback(config.listen.host):
            log.warning("--insecure: whoever reaches %s can read and change what callers send", config.listen)
        self._credentials = _server_credentials(config, on_failure)
        tokens = config.auth_token_file
        self.interceptors = [] if tokens is None else [BearerTokens(tokens, on_failure)]
        self.identities = Identities(by_token=tokens is not None)

    def certificate_ends(self) -> Iterator[tuple[tuple[str], tuple[float]]]:
        """Option and the Unix time from which on a certificate in its file, as it is now, is not valid. Any thread."""
        ends = ends_of({"tls_cert": self._config.tls_cert, "tls_client_ca": self._config.tls_client_ca})
        return (((option,), (end,)) for option, end in ends.items())

    def add_port(self, server: grpc.aio.Server, address: Address) -> int:
        """Bind `server` to `address`; the port. Raises RuntimeError when it cannot be bound."""
        if self._credentials is None:
            return server.add_insecure_port(str(address))
        return server.add_secure_port(str(address), self._credentials)

    def add_unix_socket(self, server: grpc.aio.Server, path: Path) -> None:
        """Bind `server` to a unix socket that only this user can connect to. Raises `InvalidOption`."""
        if _answers(path):
            raise InvalidOption(f"--unix-socket {path} is in use; choose another path or stop what listens there")
        mask = os.umask(0o177)
        try:
            server.add_insecure_port(f"{UNIX}{path}")
        except RuntimeError as error:
            raise InvalidOption(f"--unix-socket {path} cannot be bound: {error}") from None
        finally:
            os.umask(mask)

    def __str__(self) -> str:
        if self._config.tls_cert is None:
            transport = "plaintext"
        else:
            transport = "TLS" if self._config.tls_client_ca is None else "mutual TLS"
        return f"{transport}, {'bearer token' if self.interceptors else 'no token'}"


def _answers(path: Path) -> bool:
    """Whether something listens there: gRPC would take the path away from it without a word."""
    with socket.socket(socket.AF_UNIX) as connection:
        try:
            connection.connect(str(path))
        except OSError:
            return False
    return True


def _server_credentials(config: ServerConfig, on_failure: Callable[[], object]) -> grpc.ServerCredentials | None:
    """Credentials that read the certificate files again at the first connection after a change."""
    certificate, key, authorities = config.tls_cert, config.tls_key, config.tls_client_ca
    if certificate is None or key is None:
        return None
    paths = (certificate, key) if authorities is None else (certificate, key, authorities)
    files = WatchedFiles(paths, lambda: _read_certificates(certificate, key, authorities), on_failure)

    def fetch() -> grpc.ServerCertificateConfiguration:
        # None is gRPC's documented word for "no change"; its type stub does not know it.
        return files.value if files.refresh() else None  # type: ignore[return-value]

    return grpc.dynamic_ssl_server_credentials(files.value, fetch, require_client_authentication=bool(authorities))


def _read_certificates(certificate: Path, key: Path, authorities: Path | None) -> grpc.ServerCertificateConfiguration:
    chain, secret = _read("--tls-cert", certificate), _read("--tls-key", key)
    trusted = None if authorities is None else _read("--tls-client-ca", authorities)
    # gRPC says nothing of what it cannot use, and then refuses every connection.
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(certificate, key, password="")
    except (OSError, ValueError) as error:
        raise InvalidOption(
            f"--tls-cert {certificate} and --tls-key {key} are not a PEM certificate with its unencrypted key: {error}"
        ) from None
    if trusted is not None:
        try:
            context.load_verify_locations(cadata=trusted.decode(errors="replace"))
        except (OSError, ValueError) as error:
            raise InvalidOption(f"--tls-client-ca {authorities} is not a PEM file of certificates: {error}") from None
    return grpc.ssl_server_certificate_configuration([(secret, chain)], trusted)


def _read_tokens(path: Path) -> tuple[bytes, ...]:
    tokens = tuple(line.strip() for line in _read("--auth-token-file", path).splitlines() if line.strip())
    if not tokens:
        raise InvalidOption(f"--auth-token-file {path} is empty; write at least one token, one a line")
    return tokens


def _read(option: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidOption(f"{option} {path} cannot be read: {error.strerror}") from None


def _refusal(error: Unauthenticated) -> Handler:
    """Answers calls of any kind, before their first message is read."""

    async def refuse(requests: object, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(error.code, str(error))

    return grpc.stream_stream_rpc_method_handler(refuse)
