"""What the metrics port answers to people and probes, and the status page in a browser."""

import asyncio
import contextlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from prometheus_client import CollectorRegistry

from expertd import __version__
from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.server.app import Server
from expertd.server.assembly import assemble
from expertd.server.failpoints import VARIABLE
from expertd.server.options.config import ServerConfig
from expertd.server.telemetry.metrics import STAGES, Metrics
from tests.support.programs import find_program, node_modules
from tests.support.serving import ANY_PORT, execute_method, open_channel, random_batch, request_for, running_server

ALL = range(16)
BROWSER = Path(__file__).parents[2] / "browser"


def get(server: Server, path: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(f"http://{server.metrics_address}{path}", timeout=20) as answer:
            return answer.status, str(answer.read(), "utf-8")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, str(error.read(), "utf-8")


@contextlib.asynccontextmanager
async def busy_server(model: Path) -> AsyncIterator[Server]:
    """A server that answered three requests on layer 2 and refused one."""
    async with running_server(model, ALL) as server, open_channel(server) as channel:
        execute = execute_method(channel)
        for seed in range(3):
            await execute(request_for(server, random_batch(10, 256, 16, 4, seed=seed), layer=2))
        with pytest.raises(grpc.aio.AioRpcError):
            await execute(request_for(server, random_batch(1, 256, 16, 4), layer=50))
        yield server


async def test_the_snapshot_tells_what_happened(small_model: Path) -> None:
    async with busy_server(small_model) as server:
        code, text = await asyncio.to_thread(get, server, "/status.json")
    status: dict[str, Any] = json.loads(text)
    assert code == 200
    assert (status["address"], status["version"]) == (str(server.address), __version__)
    assert (status["ready"], status["reason"], status["in_flight"]) == (True, None, 0)
    assert status["outcomes"] == {"ok": 3, "not_found": 1}
    assert status["queue"] == {"tokens": 0, "capacity": 65536}
    assert status["tokens_per_second"] == pytest.approx(10 * status["requests_per_second"])
    assert status["requests_per_second"] == pytest.approx(3 / status["span"])
    assert list(status["stages"]) == list(STAGES)
    assert all(0 <= times["p50"] <= times["p99"] for times in status["stages"].values())
    assert [(error["outcome"], error["message"]) for error in status["errors"]] == [
        ("not_found", "layer is 50; this server owns layers 1-2")
    ]
    loads = status["loads"]
    assert (loads["layers"], loads["experts"]) == ([1, 2], list(ALL))
    expected = sum(
        random_batch(10, 256, 16, 4, seed=seed).expert_ids.flatten().add(1).bincount(minlength=17) for seed in range(3)
    )
    assert loads["pairs"] == [[0] * 16, expected[1:].tolist()]  # type: ignore[index]
    assert list(loads["balance"]) == ["2"]
    assert (status["config"]["experts"], status["config"]["max_queued_tokens"]) == ("0-15", "65536")


async def test_rates_look_back_no_further_than_the_server_lives_or_a_minute(small_model: Path) -> None:
    async with busy_server(small_model) as server:
        now = time.monotonic()
        server.pages.status = replace(server.pages.status, clock=lambda: now + 30)
        half = json.loads((await asyncio.to_thread(get, server, "/status.json"))[1])
        server.pages.status = replace(server.pages.status, clock=lambda: now + 3600)
        later = json.loads((await asyncio.to_thread(get, server, "/status.json"))[1])
    assert 30 < half["span"] < 60
    assert half["requests_per_second"] == pytest.approx(3 / half["span"])
    assert (later["span"], later["requests_per_second"], later["stages"]) == (60, 0, {})


async def test_a_clock_of_the_day_that_is_set_back_makes_nothing_younger(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with busy_server(small_model) as server:
        day = time.time
        monkeypatch.setattr(time, "time", lambda: day() - 3600)
        now = server.pages.status.snapshot()
    assert now["time"] < day() - 3500
    assert 0 < now["span"] <= now["uptime"] < 600
    assert now["requests_per_second"] == pytest.approx(3 / now["span"])


async def test_probes_follow_the_life_of_the_server(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "slow_loading=1:1")
    config = ServerConfig(model=small_model, experts=tuple(ALL), listen=ANY_PORT, metrics=ANY_PORT, backend="torch")
    server = assemble(config, Metrics(CollectorRegistry()))
    running = asyncio.create_task(server.run())
    while server.metrics_address.port == 0:
        await asyncio.sleep(0.01)
    assert await asyncio.to_thread(get, server, "/readyz") == (503, "the server is starting\n")
    assert await asyncio.to_thread(get, server, "/healthz") == (200, "alive\n")
    await server.ready.wait()
    assert await asyncio.to_thread(get, server, "/readyz") == (200, "ready\n")
    server.engine.close("the server is draining; use another replica")
    assert await asyncio.to_thread(get, server, "/readyz") == (503, "the server is draining; use another replica\n")
    assert json.loads((await asyncio.to_thread(get, server, "/status.json"))[1])["ready"] is False
    server.stop()
    await running


async def test_a_stuck_event_loop_is_not_alive(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server:
        server.pages.alive_seconds = 0.2
        asking = asyncio.create_task(asyncio.to_thread(get, server, "/healthz"))
        await asyncio.sleep(0)
        time.sleep(3)
        code, text = await asking
    assert code == 503
    assert "event loop has not answered within 0.2 s" in text


async def test_other_paths_are_not_found(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server:
        assert await asyncio.to_thread(get, server, "/nothing") == (404, "no /nothing; try /")


async def test_an_address_that_is_none_is_refused(small_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running_server(small_model, ALL) as server:
        port = server.metrics_address.port
        for method in ("GET", "HEAD"):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(f"{method} //[ HTTP/1.1\r\n\r\n".encode())
            assert await reader.read() == b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            writer.close()
        assert await asyncio.to_thread(get, server, "/healthz") == (200, "alive\n")
    assert not [record for record in caplog.records if record.exc_info]


async def look(server: Server, picture: Path, scheme: str) -> dict[str, Any]:
    """What tests/browser/look.js sees."""
    find_program("chromium", package="chromium")
    node, packages = find_program("node", package="nodejs"), node_modules(BROWSER / "package.json")
    process = await asyncio.create_subprocess_exec(
        *(node, str(BROWSER / "look.js"), f"http://{server.metrics_address}/", str(picture), scheme),
        env=os.environ | {"NODE_PATH": str(packages)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), 180)
    assert process.returncode == 0, stderr.decode()
    seen: dict[str, Any] = json.loads(stdout)
    return seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_a_reader_sees_the_server_in_a_browser(small_model: Path, tmp_path: Path, scheme: str) -> None:
    picture = tmp_path / "page.png"
    async with busy_server(small_model) as server:
        seen = await look(server, picture, scheme)
    assert seen["complaints"] == []
    assert {url.removeprefix(f"http://{server.metrics_address}") for url in seen["requests"]} <= {
        "/",
        "/status.json",
    } | {url for url in seen["requests"] if url.startswith("data:")}
    assert (seen["title"], seen["state"]) == (f"{server.address} · expertd", "serving")
    for text in (
        f"{small_model.name} · experts 0-15 · layers 1-2",
        "not_found",
        "layer is 50; this server owns layers 1-2",
        "3 answered",
    ):
        assert text in seen["text"]
    assert all(stage.replace("_", " ") in seen["text"] for stage in STAGES)
    assert seen["tip"].startswith("layer 1, expert 0")
    assert seen["cells"] == 32
    assert seen["colours"] > 4
    assert not seen["wider"]
    assert seen["background"] == {"light": "rgb(245, 246, 248)", "dark": "rgb(15, 18, 22)"}[scheme]
    assert picture.read_bytes().startswith(b"\x89PNG")


async def test_256_experts_have_room_on_every_screen(tmp_path: Path) -> None:
    model = DemoModel(hidden_size=128, moe_intermediate_size=128, moe_layers=1, quantized=False)
    async with running_server(write_demo_checkpoint(tmp_path, model), range(256)) as server:
        seen = await look(server, tmp_path / "page.png", "light")
    assert seen["cells"] == 256
    assert "none since the start" in seen["text"]
    assert list(seen["widths"]) == ["390", "768", "1024", "1440"]
    for width, amiss in seen["widths"].items():
        labels, tiles = amiss.pop("labels"), amiss.pop("tiles")
        assert amiss == {"wider": False, "touching": 0, "squeezed": False}, width
        # No screen has more than it can hold, or a last row with gaps.
        assert (labels, tiles) == {"390": (4, 2), "768": (16, 3), "1024": (16, 3), "1440": (32, 6)}[width]
