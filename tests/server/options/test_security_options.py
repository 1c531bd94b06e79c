"""Options of a server's security: what is refused at the start, and what --insecure allows."""

import os
from pathlib import Path
from typing import Any

import pytest

from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.server.options.config import Address, InvalidOption, ServerConfig
from expertd.server.rpc.security import ServerSecurity
from tests.support.certificates import Authority
from tests.support.serving import running_server


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "node0.example.org"])
def test_plaintext_that_other_machines_reach_is_refused_unless_told(
    host: str, caplog: pytest.LogCaptureFixture
) -> None:
    listen = Address(host, 50051)
    complaint = r"^--listen .*would take plaintext from other machines; give --tls-cert and --tls-key, or --insecure"
    with pytest.raises(InvalidOption, match=complaint):
        ServerConfig(model=Path("m"), experts=(0,), listen=listen)
    told = ServerConfig(model=Path("m"), experts=(0,), listen=listen, insecure=True)
    assert str(ServerSecurity(told)) == "plaintext, no token"
    assert f"--insecure: whoever reaches {listen} can read" in caplog.text
    encrypted = ServerConfig(model=Path("m"), experts=(0,), listen=listen, tls_cert=Path("c"), tls_key=Path("k"))
    assert encrypted.listen == listen


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_plaintext_on_loopback_needs_no_permission(host: str) -> None:
    assert ServerConfig(model=Path("m"), experts=(0,), listen=Address(host, 1)).insecure is False


async def test_a_server_told_insecure_serves_plaintext_on_all_addresses(small_model: Path) -> None:
    listen = Address("0.0.0.0", 0)
    async with running_server(small_model, range(16), listen=listen, insecure=True) as server:
        transport = GrpcTransport(f"127.0.0.1:{server.address.port}")
        assert (await transport.get_shard(5.0)).backend == "torch"
        await transport.close()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"tls_cert": "server.crt"}, "--tls-cert needs --tls-key"),
        ({"tls_key": "server.key"}, "--tls-key needs --tls-cert"),
        ({"tls_client_ca": "authority.pem"}, "--tls-client-ca needs --tls-cert and --tls-key"),
        ({"tls_cert": "server.crt", "tls_key": "server.key", "insecure": True}, "--insecure contradicts --tls-cert"),
        ({"tls_cert": "none.crt", "tls_key": "server.key"}, "--tls-cert .*none.crt cannot be read: No such file"),
        ({"tls_cert": "server.crt", "tls_key": "client.key"}, "--tls-cert .* and --tls-key .* are not a PEM cert"),
        (
            {"tls_cert": "server.crt", "tls_key": "locked.key"},
            "--tls-cert .* and --tls-key .*locked.key .* with its unencrypted key",
        ),
        (
            {"tls_cert": "server.crt", "tls_key": "server.key", "tls_client_ca": "tokens"},
            "--tls-client-ca .*tokens is not a PEM file of certificates",
        ),
        ({"auth_token_file": "none"}, "--auth-token-file .*none cannot be read: No such file"),
        ({"auth_token_file": os.devnull}, "--auth-token-file /dev/null is empty; write at least one token"),
        ({"max_streams": 0}, "--max-streams is 0; it must be greater than 0"),
        ({"max_connections": 0}, "--max-connections is 0; it must be greater than 0"),
    ],
)
def test_security_options_that_cannot_work_are_refused_by_name(
    tmp_path: Path, options: dict[str, Any], complaint: str
) -> None:
    authority = Authority(tmp_path)
    for name in ("server", "client"):
        authority.issue(name)
    authority.issue("locked", password=b"secret")
    (tmp_path / "tokens").write_text("secret")
    placed: dict[str, Any] = {
        name: tmp_path / value if isinstance(value, str) else value for name, value in options.items()
    }
    with pytest.raises(InvalidOption, match=f"^{complaint}"):
        ServerSecurity(ServerConfig(model=Path("m"), experts=(0,), **placed))
