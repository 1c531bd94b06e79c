"""Credentials of clients: what is refused before anything is sent."""

from pathlib import Path
from typing import Any

import pytest

from expertd.client.transport.security import ClientSecurity
from expertd.proto.base.errors import Unauthenticated
from tests.support.certificates import Authority


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"client_cert": Path("c")}, "client_cert and client_key belong together"),
        ({"client_cert": Path("c"), "client_key": Path("k")}, "client_cert needs TLS; give root_ca too"),
        ({"server_name": "example.org"}, "server_name needs TLS; give root_ca too"),
        ({"token": "a", "token_file": Path("t")}, "token and token_file are both given"),
        ({"token": ""}, "token is empty or has spaces"),
        ({"token": "hidden words"}, "token is empty or has spaces"),
        ({"token": "hidden\n"}, "token is empty or has spaces"),
    ],
)
def test_fields_that_cannot_work_are_refused_without_showing_the_token(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as caught:
        ClientSecurity(**fields)
    assert "hidden" not in str(caught.value)


async def test_files_that_cannot_be_used_are_refused_by_name(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    cert, key = authority.issue("client")
    _, other_key = authority.issue("other")
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"root_ca": tmp_path / "none"}, "root_ca .*none cannot be read: No such file"),
        ({"root_ca": key}, "root_ca .*client.key is not a PEM file of certificates"),
        ({"client_cert": tmp_path / "none", "client_key": key}, "client_cert .*none cannot be read"),
        ({"client_cert": cert, "client_key": other_key}, "client_cert .* and client_key .*other.key are not a PEM"),
    )
    for fields, complaint in cases:
        security = ClientSecurity(**({"root_ca": authority.pem} | fields))
        with pytest.raises(ValueError, match=complaint):
            security.open_channel("127.0.0.1:1", ())


def test_an_unusable_token_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(Unauthenticated, match=r"token_file .*none cannot be read"):
        ClientSecurity(token_file=tmp_path / "none").metadata()
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(Unauthenticated, match=r"token_file .*empty is empty"):
        ClientSecurity(token_file=tmp_path / "empty").metadata()


async def test_tokens_leave_this_machine_in_plaintext_only_when_told() -> None:
    for address in ("node0:50051", "10.0.0.1:50051", "[2001:db8::1]:50051"):
        with pytest.raises(ValueError, match=r"to .* in plaintext; give root_ca, or insecure"):
            ClientSecurity(token="a").open_channel(address, ())
        await ClientSecurity(token="a", insecure=True).open_channel(address, ()).close()
        await ClientSecurity().open_channel(address, ()).close()
    for address in ("localhost:50051", "127.0.0.1:50051", "[::1]:50051"):
        await ClientSecurity(token="a").open_channel(address, ()).close()
