"""Incidents as an operator meets them: what is seen, by which alert, and that the documented commands mend it.

docs/operations.md has a section for each; its commands are what is run here. `-s` prints how long all took.
"""

import datetime
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest

from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.model.ranges import parse_ranges
from tests.drills.scene import HOT, MANUAL, MARK, PROMPT_SECONDS, STARTED, Scene, commands, playing, until
from tests.support.certificates import Authority
from tests.support.coordinators import LAYER
from tests.support.families import SMALL

BAD_MODEL, LOST_GPU, EXPIRING = "A bad model version", "A lost GPU", "A certificate that expires tonight"
SLOW, HOTTEST = "A slow replica", "A hot expert"
DAY = 86400
ANOTHER = 'expertd_coordinator_servers{standing="another_model"}'
END = 'min(expertd_certificate_expiry_timestamp_seconds{file="tls_cert"}) - time()'


def told(incident: str, seen: float, mended: float) -> None:
    print(f"\n{incident}: seen after {seen:.0f} s, mended {mended:.0f} s after the first command")


async def mend(scene: Scene, script: str, alert: str = "") -> float:
    """Run a document's commands, until no alert is left, nor `alert` of the machine; how long that took."""
    started = time.monotonic()
    scene.shell(script)
    await until(lambda: not (scene.firing() | scene.blamed(alert)), 2 * PROMPT_SECONDS)
    failed = len(scene.failed_calls)
    calls = scene.calls
    await until(lambda: scene.calls > calls + 20)
    assert len(scene.failed_calls) == failed
    return time.monotonic() - started


def test_no_documented_command_is_left_out() -> None:
    played = sum(len(commands(title)) for title in (BAD_MODEL, LOST_GPU, EXPIRING, SLOW, HOTTEST))
    assert played == MANUAL.read_text().count(f"<!-- {MARK} -->")


async def test_a_bad_model_version(small_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    look, repair = commands(BAD_MODEL)
    other = write_demo_checkpoint(tmp_path / "other", replace(SMALL, seed=SMALL.seed + 1))
    async with playing(tmp_path, small_model) as scene:
        await scene.stop("node1")
        scene.start("node1", other)
        await scene.ready("node1")
        seen = await until(lambda: "ExpertdModelsDiffer" in scene.firing())
        assert scene.firing() <= {"ExpertdModelsDiffer", "ExpertdServerDown"}
        assert await until(lambda: scene.value(ANOTHER) == 1.0) < PROMPT_SECONDS
        assert "stays out of use" in caplog.text
        assert "it holds another model" in caplog.text
        shown = scene.shell(look, check=False)
        assert "fleet: mixed models: " in shown
        assert "problem: mixed models: " in shown
        told("a bad model version", seen, await mend(scene, repair))
        # The other owner answered meanwhile.
        assert scene.failed_calls == []
        assert scene.value(ANOTHER) == 0.0


async def test_a_lost_gpu(small_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    look, repair = commands(LOST_GPU)
    async with playing(tmp_path, small_model) as scene:
        await scene.stop("node1")
        scene.start("node1", environment={"EXPERTD_FAILPOINTS": "device_error=1"})
        await until(lambda: scene.processes[-1].poll() is not None)
        assert scene.processes[-1].returncode == 1
        seen = await until(lambda: "ExpertdServerDown" in scene.firing())
        assert scene.firing() <= {"ExpertdServerDown", "ExpertdRequestsFaulty"}
        assert scene.value('expertd_coordinator_servers{standing="unavailable"}') == 1.0
        shown = scene.shell(look, check=False)
        assert "no answer" in shown
        assert "does not serve" in shown
        assert " is out of use: " in caplog.text
        assert "failpoint device_error" in scene.log("node1")
        told("a lost GPU", seen, await mend(scene, repair))
        assert scene.failed_calls == []


async def test_a_slow_replica(small_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    look, repair = commands(SLOW)
    async with playing(tmp_path, small_model) as scene:
        slow, metrics = scene.local("node1:50051"), scene.local("node1:9464")
        await scene.stop("node1")
        scene.start("node1", environment={"EXPERTD_FAILPOINTS": "delay=1:0.5"})
        await scene.ready("node1")
        seen = await until(lambda: scene.blamed("ExpertdServerLags") == {metrics})
        assert scene.firing() <= {"ExpertdServerDown"}
        await until(lambda: "it is asked only in need" in caplog.text)
        assert f"{slow} takes " in caplog.text
        attempts = f'expertd_coordinator_attempt_duration_seconds_bucket{{server="{slow}"}}'
        assert (scene.value(f"histogram_quantile(1, sum by (le) ({attempts}))") or 0.0) > 0.25
        # The slowest comes first.
        assert re.findall(r"127\.0\.0\.1:\d+", scene.shell(look))[0] == metrics
        told("a slow replica", seen, await mend(scene, repair, "ExpertdServerLags"))
        assert scene.failed_calls == []


async def test_a_hot_expert(small_model: Path, tmp_path: Path) -> None:
    look, repair = commands(HOTTEST)
    # Devices that take a while for each batch, into which one request of these goes.
    device = {"EXPERTD_FAILPOINTS": "stuck_device=1:0.025"}
    options = ("--per-expert-metrics", "--max-batch-tokens", "32", "--max-tokens-per-request", "32")
    async with (
        playing(tmp_path, small_model, *options, environment=device) as scene,
        scene.calling(*(scene.call(0.0, hot=True) for _ in range(4))),
    ):
        hot = scene.local("node0:9464")
        seen = await until(lambda: scene.blamed("ExpertdServerHot") == {hot} and not scene.blamed("ExpertdServerLags"))
        assert scene.firing() == set()
        shown = scene.shell(look)
        assert "balancedness" in shown
        planned = json.loads((tmp_path / "plan.json").read_text())["servers"]
        assert sum(HOT in parse_ranges(server["experts_by_layer"][str(LAYER)]) for server in planned) > 1
        mended = await mend(scene, repair, "ExpertdServerHot")
        told("a hot expert", seen, mended)
        assert scene.failed_calls == []


async def test_a_certificate_that_expires_tonight(small_model: Path, tmp_path: Path) -> None:
    look, repair = commands(EXPIRING)
    lasts = datetime.timedelta(days=90)
    authority = Authority(tmp_path, "ca", lasts)
    certificate, key = authority.issue("server", lasts=lasts)
    (tmp_path / "new").mkdir()
    for path in authority.issue("renewed", lasts=lasts):
        path.rename(tmp_path / "new" / f"server{path.suffix}")
    tls = ("--tls-cert", str(certificate), "--tls-key", str(key))
    async with playing(tmp_path, small_model, *tls, security=ClientSecurity(root_ca=authority.pem)) as scene:
        expiring, its_key = authority.issue("expiring", lasts=datetime.timedelta(hours=6))
        its_key.rename(key)
        expiring.rename(certificate)
        seen = await until(lambda: (scene.value(END) or DAY) < 6.1 * 3600)
        seen += await until(lambda: len(scene.blamed("ExpertdCertificateExpires")) == len(STARTED))
        assert scene.firing() == {"ExpertdCertificateExpires"}
        assert "notAfter=" in scene.shell(look)
        mended = await mend(scene, repair)
        mended += await until(lambda: (scene.value(END) or 0.0) > 14 * DAY)
        told("a certificate that expires tonight", seen, mended)
        assert scene.failed_calls == []
