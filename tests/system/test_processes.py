"""Server processes as an operator sees them: exit codes, signals, messages, agreement between them."""

import asyncio
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertd import __version__
from expertd.client.base.gate import load_gates
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.tools.cluster import LocalCluster, ServerDied, even_shards
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.proto.base.errors import Unavailable
from tests.support.fence.markers import no_gpu

OPTIONS = ["--backend", "torch", "--threads", "1"]


def expertd(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "expertd.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


async def test_eight_servers_and_one_agree_and_repeat_bit_for_bit(small_model: Path) -> None:
    with Checkpoint(small_model) as checkpoint:
        gates = load_gates(checkpoint, (1, 2))
    exact = CoordinatorConfig(
        gates=gates, hidden_dtype=torch.bfloat16, reply_dtype=torch.float32, output_dtype=torch.float32
    )
    hidden = torch.randn(200, 256).bfloat16()
    shards = [*even_shards(16, 8), "0-15"]
    async with (
        LocalCluster(small_model, shards, OPTIONS) as cluster,
        Coordinator(cluster.addresses[:8], exact) as eight,
        Coordinator(cluster.addresses[8:], exact) as one,
    ):
        for layer in (1, 2):
            first = await eight(layer, hidden)
            assert torch.equal(await eight(layer, hidden), first)
            assert relative_error(first, await one(layer, hidden)) < 1e-5
    assert cluster.exit_codes == [0] * 9


async def test_health_is_serving_only_when_ready_and_sigterm_exits_0(small_model: Path) -> None:
    async with LocalCluster(small_model, ["0-15"], OPTIONS) as cluster:
        async with grpc.aio.insecure_channel(cluster.addresses[0]) as channel:
            health: Any = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        cluster.servers[0].process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(cluster.servers[0].process.wait(), 10) == 0
        log = cluster.servers[0].log.read_text()
    assert "backend torch on cpu" in log
    assert "(--backend torch)" in log
    assert "Traceback" not in log


async def test_sigterm_while_starting_exits_0(small_model: Path, tmp_path: Path) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "expertd.cli", "serve", "--model", str(small_model), "--experts", "0-15"),
        *("--listen", "127.0.0.1:0", "--metrics", "127.0.0.1:0", *OPTIONS),
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stderr is not None
    while b"loading layers" not in await process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    rest = await process.stderr.read()
    assert await process.wait() == 0, rest.decode()


def in_flight(metrics_url: str) -> float:
    with urllib.request.urlopen(metrics_url) as answer:
        text = str(answer.read(), "utf-8")
    return float(text.split("\nexpertd_requests_in_flight ")[1].split("\n")[0])


def test_a_full_collection_does_not_go_through_what_imports_made(small_model: Path) -> None:
    # In place of serving, tell how many objects are left out.
    program = (
        "import gc, sys, uvloop\n"
        "uvloop.run = lambda main: (main.close(), print(gc.get_freeze_count()))\n"
        "from expertd.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    command = ["serve", "--model", str(small_model), "--experts", "0-7", *OPTIONS]
    done = subprocess.run([sys.executable, "-c", program, *command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100_000


async def test_a_second_signal_ends_at_once(small_model: Path) -> None:
    unsplit = CoordinatorConfig(chunk_bytes=1 << 30)
    async with LocalCluster(small_model, ["0-15"], OPTIONS) as cluster, Coordinator(cluster.addresses, unsplit) as moe:
        process = cluster.servers[0].process
        hidden, weights = torch.randn(4096, 256), torch.ones(4096, 4)
        ids = torch.arange(4).expand(4096, 4)
        calls = [asyncio.create_task(moe(1, hidden, topk_ids=ids, topk_weights=weights)) for _ in range(15)]
        while await asyncio.to_thread(in_flight, cluster.servers[0].metrics_url) < 5:
            await asyncio.sleep(0.01)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(process.wait(), 10) == 128 + signal.SIGTERM
        assert time.monotonic() - started < 1
        await asyncio.wait(calls)
        errors = [call.exception() for call in calls]
        assert any(isinstance(error, Unavailable) for error in errors)
        assert all(error is None or isinstance(error, Unavailable) for error in errors)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--experts", "0-16"], "--experts names expert 16; the model's experts are 0-15"),
        (["--experts", "0-15", "--layers", "0"], "--layers names layer 0; the model's MoE layers are 1-2"),
        (["--experts", "zero"], "--experts: 'zero' is not a number or a range"),
        pytest.param(
            ["--experts", "0", "--backend", "cutile"],
            "--backend cutile cannot run here: torch sees no CUDA device",
            marks=no_gpu,
        ),
        (["--experts", "0", "--model", "/nowhere"], "/nowhere/config.json does not exist"),
    ],
)
def test_what_cannot_work_is_refused_with_exit_code_2(small_model: Path, arguments: list[str], complaint: str) -> None:
    model = [] if "--model" in arguments else ["--model", str(small_model)]
    ended = expertd("serve", *model, *arguments)
    assert ended.returncode == 2
    assert f"expertd serve: error: {complaint}" in ended.stderr
    assert "Traceback" not in ended.stderr


async def test_a_server_that_cannot_start_is_reported_with_its_log(small_model: Path) -> None:
    with pytest.raises(ServerDied, match=r"(?s)server 1 \(experts 16-17\) is not ready: exit code 2.*names expert 17"):
        async with LocalCluster(small_model, ["0-15", "16-17"], OPTIONS):
            pass


def test_help_and_version_need_no_torch() -> None:
    assert expertd("--version").stdout.strip() == f"expertd {__version__}"
    overview = expertd("--help").stdout
    assert "serve" in overview
    assert "demo" in overview
    assert "--max-queued-tokens" in expertd("serve", "--help").stdout
    imports = "import sys, expertd.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", imports], check=False).returncode == 0


def test_uneven_shards_are_refused() -> None:
    assert even_shards(256, 8)[:2] == ["0-31", "32-63"]
    with pytest.raises(ValueError, match="256 experts cannot be split evenly over 7 servers"):
        even_shards(256, 7)
