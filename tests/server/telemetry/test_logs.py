"""The log of a server process: one line a request at debug only, JSON when asked, no secret ever."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.tools.cluster import LocalCluster
from expertd.client.transport.security import ClientSecurity
from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.base.errors import Unauthenticated
from expertd.server.telemetry.logs import JsonFormatter, TextFormatter
from tests.support.certificates import Authority
from tests.support.serving import execute_method, until

TOKEN, WRONG_TOKEN = "Zr0-a-secret-token", "Zr0-a-wrong-token"
CALLS = 5


def record(message: str, *arguments: object, **fields: object) -> logging.LogRecord:
    made = logging.getLogger("expertd.test").makeRecord(
        "expertd.test", logging.INFO, __file__, 1, message, arguments, None, extra=fields
    )
    made.created = 1795400875.25
    return made


def test_a_json_line_holds_the_fields_of_the_record() -> None:
    line = JsonFormatter().format(record("%d tokens\nof %s", 3, "x", layer=7, path=Path("/a")))
    assert "\n" not in line
    assert json.loads(line) == {
        "time": "2026-11-23T02:27:55.250+00:00",
        "level": "info",
        "logger": "expertd.test",
        "message": "3 tokens\nof x",
        "layer": 7,
        "path": "/a",
    }


def test_exceptions_are_in_the_line_with_their_traceback() -> None:
    failed = record("failed")
    try:
        raise ValueError("of this")
    except ValueError:
        failed.exc_info = sys.exc_info()
    assert "ValueError: of this" in json.loads(JsonFormatter().format(failed))["exception"]
    assert TextFormatter().format(failed).endswith("ValueError: of this")


def test_text_ends_with_the_fields() -> None:
    assert (
        TextFormatter()
        .format(record("answered", layer=7, seconds=0.5))
        .endswith(" INFO expertd.test: answered layer=7 seconds=0.5")
    )


@pytest.mark.parametrize("level", ["debug", "info"])
async def test_every_request_is_one_line_at_debug_and_secrets_are_in_none(
    small_model: Path, tmp_path: Path, level: str
) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server")
    tokens = tmp_path / "tokens"
    tokens.write_text(f"{TOKEN}\n")
    options = ["--backend", "torch", "--log-level", level, "--log-format", "json", "--auth-token-file", str(tokens)]
    options += ["--tls-cert", str(certificate), "--tls-key", str(key)]
    async with LocalCluster(small_model, ["0-15"], options) as cluster:
        right, wrong = (ClientSecurity(root_ca=authority.pem, token=token) for token in (TOKEN, WRONG_TOKEN))
        async with Coordinator(cluster.addresses, CoordinatorConfig(security=right)) as moe:
            ids = torch.arange(4).expand(3, 4)
            for _ in range(CALLS):
                await moe(2, torch.randn(3, 256), topk_ids=ids, topk_weights=torch.ones(3, 4))
        async with right.open_channel(cluster.addresses[0], []) as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await execute_method(channel)(pb.ExecuteRequest(), metadata=right.metadata())
        with pytest.raises(Unauthenticated):
            await Coordinator(cluster.addresses, CoordinatorConfig(security=wrong)).__aenter__()
        file = cluster.servers[0].log
        if level == "debug":
            await until(lambda: "request refused: num_tokens" in file.read_text())
        text = file.read_text()
    lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*(set(line) for line in lines))
    answered = [line for line in lines if line["message"] == "request answered"]
    assert len(answered) == (CALLS if level == "debug" else 0)
    for line in answered:
        assert (line["outcome"], line["layer"], line["tokens"], line["pairs"]) == ("ok", 2, 3, 12)
        assert line["caller"].startswith("ipv4:127.0.0.1:")
        assert line["seconds"] > 0
    refused = [line["outcome"] for line in lines if line["message"].startswith("request refused: num_tokens")]
    assert refused == (["invalid_argument"] if level == "debug" else [])
    secrets = [TOKEN, WRONG_TOKEN, *re.findall(r"^[\w+/=]{20,}$", key.read_text(), re.MULTILINE)]
    assert len(secrets) > 3
    assert not [secret for secret in secrets if secret in text]


def test_errors_at_the_start_are_json_too(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "expertd.cli", "serve", "--model", str(tmp_path), "--experts", "0"]
    ended = subprocess.run([*command, "--log-format", "json"], capture_output=True, text=True)
    assert ended.returncode == 2
    line = json.loads(ended.stderr)
    assert line["level"] == "critical"
    assert "config.json" in line["message"]
