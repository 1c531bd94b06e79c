"""`expertd doctor`: what it says of healthy machines and of sick ones."""

import argparse
import asyncio
import datetime
import json
import resource
import socket
from pathlib import Path
from typing import Any

import pytest

from expertd import cli
from expertd.kernels.cutile.pipeline.toolchain import Toolchain
from expertd.kernels.model.config import MoeConfig
from expertd.server.doctor import checkup, gpu, host, peers
from expertd.server.doctor.finding import Finding
from expertd.server.options.config import Address, ServerConfig
from tests.support.certificates import Authority
from tests.support.serving import random_weights, running_server

OPTIONS = ("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--backend", "torch")


def diagnose(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    checkup.add_arguments(parser)
    return checkup.run(parser.parse_args(arguments))


def config(**options: Any) -> ServerConfig:  # noqa: ANN401
    return ServerConfig(model=Path("m"), experts=(0,), **options)


def only(findings: list[Finding], check: str) -> Finding:
    (found,) = (finding for finding in findings if finding.check == check)
    return found


async def test_a_machine_that_can_serve_passes(small_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running_server(small_model, range(8, 16)) as peer:
        options = ("--model", str(small_model), "--experts", "0-7", *OPTIONS, "--peers", str(peer.address))
        assert await asyncio.to_thread(diagnose, *options) == 0
        shown = capsys.readouterr().out.splitlines()
        assert await asyncio.to_thread(diagnose, *options, "--json") == 0
        findings = json.loads(capsys.readouterr().out)
    assert [f"{item['level']:5} {item['check']:14} {item['text']}"[:30] for item in findings] == [
        line[:30] for line in shown
    ]
    texts = {item["check"]: item["text"] for item in findings}
    assert set(texts) == {
        "gpu",
        "native core",
        "model",
        "checkpoint",
        "host memory",
        "ports",
        "limits",
        "shared memory",
        "certificates",
        "peers",
    }
    assert texts["peers"].startswith(f"{peer.address} serves experts 8-15 of layers 1-2 with torch on cpu")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--model", "/nowhere", "--experts", "0"), "/nowhere/config.json does not exist"),
        (("--experts", "0-16"), "--experts names expert 16; the model's experts are 0-15"),
        (("--experts", "0", "--layers", "0"), "--layers names layer 0, which is no MoE layer"),
    ],
)
def test_a_checkpoint_that_cannot_be_served_fails(
    small_model: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], text: str
) -> None:
    model = () if "--model" in options else ("--model", str(small_model))
    assert diagnose(*model, *options, *OPTIONS) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("fail"))
    assert text in line


def test_the_manifest_that_is_used_is_named(
    small_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--model", str(small_model), "--experts", "0-7", *OPTIONS)
    diagnose(*options)
    assert ", of samples, without a manifest\n" in capsys.readouterr().out
    manifest = tmp_path / "manifest.json"
    cli.main(["fingerprint", str(small_model), "--output", str(manifest)])
    digest = capsys.readouterr().out.split()[0]
    diagnose(*options, "--manifest", str(manifest))
    assert f"model {digest}, the manifest {manifest}\n" in capsys.readouterr().out
    manifest.write_text("{}")
    assert diagnose(*options, "--manifest", str(manifest)) == 1
    assert f"{manifest}: expected a manifest of 'expertd fingerprint'" in capsys.readouterr().out


def test_options_that_contradict_each_other_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnose("--model", "m", "--experts", "0", "--listen", "0.0.0.0:1") == 2
    assert "expertd doctor: error: --listen 0.0.0.0:1 would take plaintext" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("driver", "backend", "level", "text"),
    [
        (None, "cutile", "fail", "nvidia-smi finds none"),
        (None, "auto", "warn", "--backend auto will compute on the CPU"),
        ("535.183.01", "auto", "fail", "535.183.01 is too old"),
        ("580.65.06", "auto", "ok", "580.65.06"),
    ],
)
def test_drivers(driver: str | None, backend: str, level: str, text: str) -> None:
    finding = only(list(gpu.check_gpu(config(backend=backend), lambda: driver)), "driver")
    assert finding.level == level
    assert text in finding.text


@pytest.mark.parametrize(
    ("capability", "pipeline", "level"),
    [((7, 5), "auto", "fail"), ((8, 0), "fast", "fail"), ((8, 9), "auto", "warn"), ((9, 0), "fast", "ok")],
)
def test_gpus(capability: tuple[int, int], pipeline: Any, level: str) -> None:  # noqa: ANN401
    assert gpu._judge_gpu("NVIDIA X", capability, config(pipeline=pipeline)).level == level


def test_the_compiler_is_tried() -> None:
    assert gpu.check_compiler("sm_90").level == "ok"
    refused = gpu.check_compiler("sm_70")
    assert refused.level == "fail"
    assert "pip install 'expertd[server]'" in refused.text


@pytest.mark.parametrize(("tileiras", "level"), [("13.4.92", "ok"), ("13.5.0", "warn")])
def test_a_compiler_that_was_not_measured_is_named(tileiras: str, level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    toolchain = Toolchain("1.7.0", tileiras)
    monkeypatch.setattr(Toolchain, "detect", lambda: toolchain)
    finding = gpu.check_compiler("sm_90")
    assert finding.level == level
    assert f"cuda-tile 1.7.0 with tileiras {tileiras}" in finding.text
    assert ("install cuda-tile 1.7.0 with tileiras 13.4.92, or run 'expertd tune'" in finding.text) == (level == "warn")


@pytest.mark.parametrize(("free", "level"), [(99, "fail"), (100, "warn"), (149, "warn"), (150, "ok")])
def test_memory_must_suffice_and_should_leave_some(free: int, level: str) -> None:
    assert host._judge_memory("gpu memory", "2 layers", 100, 50, free, "own fewer").level == level


def test_memory_is_that_of_the_wanted_layers_and_experts() -> None:
    model = MoeConfig()
    assert (
        random_weights(3, 256, 128).expert_bytes == MoeConfig(hidden_size=256, moe_intermediate_size=128).expert_bytes
    )
    wanted = ServerConfig(model=Path("m"), experts=tuple(range(32)))
    on_gpu, loading = host.check_memory(wanted, model, 2_000_000_000, 140_000_000_000)
    assert on_gpu == Finding("ok", "gpu memory", "58 layers of 32 experts: 81.76 GB of 140.00 GB free")
    assert loading.level == "fail", "two layers of 32 experts are 2.8 GB"


def test_the_limit_of_a_container_counts(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 800 kB\n")
    assert host.available_memory(tmp_path) == 800 * 1024
    cgroup = tmp_path / "sys/fs/cgroup"
    cgroup.mkdir(parents=True)
    (cgroup / "memory.max").write_text("5000\n")
    (cgroup / "memory.current").write_text("1000\n")
    assert host.available_memory(tmp_path) == 4000
    (cgroup / "memory.max").write_text("max\n")
    assert host.available_memory(tmp_path) == 800 * 1024


def test_a_port_in_use_fails_by_the_name_of_its_option() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        findings = list(host.check_ports(config(metrics=Address("127.0.0.1", port), listen=Address("::1", 0))))
    assert [finding.level for finding in findings] == ["ok", "fail"]
    assert findings[1].text.startswith(f"--metrics 127.0.0.1:{port} cannot be bound, Address already in use")


def test_few_open_files_and_little_shared_memory_are_warned_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert host.check_limits().level == "ok"
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    assert "ulimit -n" in host.check_limits().text
    assert host.check_shared_memory(tmp_path / "none").level == "warn"
    assert "--shm-size" in host.check_shared_memory(tmp_path, least=1 << 60).text


@pytest.mark.parametrize(
    ("days", "level", "text"), [(90, "ok", "is valid until"), (7, "warn", "expires on"), (-1, "fail", "expired on")]
)
def test_certificates_are_read_for_their_dates(tmp_path: Path, days: int, level: str, text: str) -> None:
    certificate, key = Authority(tmp_path).issue("server", lasts=datetime.timedelta(days=days, hours=1))
    findings = list(peers.check_certificates(config(tls_cert=certificate, tls_key=key)))
    assert [finding.level for finding in findings] == ["ok", level]
    assert text in findings[1].text


def test_certificates_that_cannot_serve_fail(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, _ = authority.issue("server")
    _, other = authority.issue("other")
    (finding,) = peers.check_certificates(config(tls_cert=certificate, tls_key=other))
    assert finding.level == "fail"
    assert "are not a PEM certificate with its unencrypted key" in finding.text
    findings = list(peers._check_dates("--tls-cert", authority.pem))
    assert "names no host in subjectAltName" in findings[-1].text


async def test_peers_are_asked_as_a_client_would(small_model: Path, tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server")
    tokens = tmp_path / "tokens"
    tokens.write_text("first\nsecond\n")
    wrong = tmp_path / "wrong"
    wrong.write_text("third\n")
    secured: dict[str, Any] = {"tls_cert": certificate, "tls_key": key, "tls_client_ca": authority.pem}
    async with running_server(small_model, range(16), **secured, auth_token_file=tokens) as server:

        async def ask(fingerprint: str | None = None, **options: Any) -> Finding:  # noqa: ANN401
            address = str(server.address)
            return await asyncio.to_thread(peers.check_peer, address, config(**options), None, fingerprint)

        assert (await ask(**secured, auth_token_file=tokens)).level == "ok"
        assert (await ask(server.shard.model_fingerprint, **secured, auth_token_file=tokens)).level == "ok"
        assert "holds another model" in (await ask("another", **secured, auth_token_file=tokens)).text
        assert "a token in common" in (await ask(**secured, auth_token_file=wrong)).text
        assert "do both sides have TLS" in (await ask()).text
        server.health.set_serving(False)
        assert (await ask(**secured, auth_token_file=tokens)).level == "warn"


def test_without_arguments_it_looks_at_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    diagnose("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", "--backend", "torch")
    shown = capsys.readouterr().out
    assert "checkpoint     none to look at: give --model" in shown
    assert "fail" not in shown
