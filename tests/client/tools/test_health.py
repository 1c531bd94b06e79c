"""`expertd health` against real servers: what a container's health check sees."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.certificates import Authority
from tests.support.serving import running_server


async def health(*arguments: str) -> tuple[int, str]:
    """Exit code and output."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "expertd.cli", "health", *arguments, "--timeout", "20"),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode()


async def test_a_server_is_healthy_until_it_is_gone(small_model: Path) -> None:
    async with running_server(small_model, range(16)) as server:
        address = str(server.address)
        assert await health(address) == (0, f"{address}: SERVING\n")
        server.health.set_serving(False)
        assert await health(address) == (1, f"{address}: NOT_SERVING\n")
    code, output = await health(address)
    assert code == 1
    assert output.startswith(f"{address}: UNAVAILABLE: ")


async def test_with_mutual_tls_it_needs_the_certificates(small_model: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server", host="node0.example.org")
    probe, probe_key = authority.issue("probe")
    options = {"tls_cert": certificate, "tls_key": key, "tls_client_ca": authority.pem}
    async with running_server(small_model, range(16), **options) as server:
        trusting = (str(server.address), "--tls-ca", str(authority.pem), "--server-name", "node0.example.org")
        assert (await health(*trusting, "--tls-client-cert", str(probe), "--tls-client-key", str(probe_key)))[0] == 0
        assert (await health(*trusting))[0] == 1
        assert (await health(str(server.address)))[0] == 1


async def test_the_metrics_port_says_it_without_certificates(small_model: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server", host="node0.example.org")
    options = {"tls_cert": certificate, "tls_key": key, "tls_client_ca": authority.pem}
    async with running_server(small_model, range(16), **options) as server:
        url = f"http://{server.metrics_address}/readyz"
        assert await health(url) == (0, f"{url}: ready\n")
        server.engine.close("the server is draining")
        assert await health(url) == (1, f"{url}: the server is draining\n")
    code, output = await health(url)
    assert code == 1
    assert "refused" in output


async def test_options_that_cannot_work_have_an_exit_code_of_their_own(tmp_path: Path) -> None:
    code, output = await health("127.0.0.1:1", "--tls-ca", str(tmp_path / "none.pem"))
    assert code == 2
    assert f"expertd health: error: root_ca {tmp_path}/none.pem cannot be read" in output


@pytest.mark.parametrize("module", ["torch", "numpy", "rich"])
def test_it_imports_nothing_slow(module: str) -> None:
    code = f"import sys, expertd.client.tools.health; sys.exit({module!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ, check=False).returncode == 0
