"""The lane's two ends: all interleavings, races, hostile writers, kills, and what a call costs."""

import re
import subprocess

import pytest

from tests.native.lane.programs import built, hostile, run
from tests.support.native.build import sanitizer

SCENARIOS = ["calls", "narrow", "loop", "loop-killed-server", "killed-caller", "killed-server", "closes"]
NEEDED = [
    ("calls", "caller store tail"),
    ("calls", "caller load asleep"),
    ("calls", "server store asleep"),
    ("calls", "server load tail"),
    ("calls", "server exchange state"),
    ("loop", "caller store looping"),
    ("loop", "caller load state"),
    ("killed-server", "caller compare state"),
]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_interleaving_loses_or_tears_a_call(scenario: str) -> None:
    assert int(run(built("explorer", "-O2"), scenario).split()[1]) > 50_000


@pytest.mark.parametrize(("scenario", "site"), NEEDED)
def test_explorer_finds_weaker_memory_orders(scenario: str, site: str) -> None:
    program = built("explorer", "-O2")
    number = re.search(rf"site (\d+): {site}\n", run(program, scenario))
    assert number is not None
    weaker = subprocess.run([program, scenario, "weaken", number[1]], capture_output=True, text=True, timeout=60)
    assert weaker.returncode == 1
    assert "violation: " in weaker.stdout


def test_no_race_is_seen_between_the_ends() -> None:
    assert "served: " in run(built("race", *sanitizer("thread")), "500")


@pytest.mark.parametrize("seed", ["1", "2", "3"])
def test_hostile_caller_harms_nobody(seed: str) -> None:
    assert "ended with a reason" in run(hostile(), "4", seed)


@pytest.mark.parametrize("kind", ["address,undefined", "thread"])
def test_calls_go_straight_to_lanes_and_all_memory_comes_back(kind: str) -> None:
    program = built("straight", *sanitizer(kind), beside=("call", "request", "tokens", "base"))
    report = run(program, "2000", "7")
    assert int(report.split()[1].rstrip(",")) > 500, report


@pytest.mark.parametrize(("end", "stride"), [("caller", "20"), ("server", "20")])
def test_killed_end_harms_nobody(end: str, stride: str) -> None:
    assert int(run(built("kills", "-O2"), end, stride).split()[1]) > 50


def test_stopped_end_costs_its_own_calls_alone() -> None:
    run(built("kills", "-O2"), "stops")


def test_call_costs_no_more_than_two_sockets() -> None:
    def ratio() -> float:
        report = run(built("exchange", "-O2"), "20000")
        print(report)
        medians = {m[1]: float(m[2]) for m in re.finditer(r"(.*): p50 ([\d.]+) us", report)}
        return medians["lane, back to back"] / medians["unix socket, back to back"]

    # Generous, and more than once, as the machine's other work comes in between.
    assert min(ratio() for _ in range(3)) < 2
