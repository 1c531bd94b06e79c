"""When waiting threads spin."""

import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.native.build import NATIVE, ROOT, build, sanitizer

US, MS, S = 1_000, 1_000_000, 1_000_000_000
MAX_NS = 3 * MS


def spin_of(native: ModuleType, *gaps: int, cpus: float = 64) -> tuple[Any, Any]:
    machine = native.Machine()
    machine.cpus = cpus
    spin = native.Spin(machine, MAX_NS)
    for gap in gaps:
        spin.learn(gap)
    return spin, machine


@pytest.mark.parametrize(
    ("gaps", "budget"),
    [
        ([], 0),
        ([50 * US], 120 * US),
        ([1 * MS] * 16, 2 * MS + 20 * US),
        ([1490 * US], 3 * MS),
        ([1491 * US], 0),
        ([10 * US] * 9 + [1 * S] * 7, 40 * US),
        ([1 * S] * 100 + [10 * US] * 9, 40 * US),
    ],
)
def test_spins_twice_the_median_of_the_last_gaps(native: ModuleType, gaps: list[int], budget: int) -> None:
    spin, _ = spin_of(native, *gaps)
    assert spin.begin(5 * S).until == (5 * S + budget if budget else 0)


@pytest.mark.parametrize(("cpus", "threads"), [(2, 0), (3.9, 0), (4, 1), (8, 2), (64, 16)])
def test_at_most_a_quarter_of_the_cpus_spin(native: ModuleType, cpus: float, threads: int) -> None:
    spin, machine = spin_of(native, 10 * US, cpus=cpus)
    turns = [spin.begin(5 * S) for _ in range(threads + 2)]
    assert [turn.until > 0 for turn in turns] == [True] * threads + [False] * 2
    assert machine.spinning == threads
    for turn in turns:
        spin.end(turn, 6 * S)
    assert machine.spinning == 0


def test_waits_for_long_batches_do_not_keep_a_thread_from_spinning_between_them(native: ModuleType) -> None:
    machine = native.Machine()
    spin = native.WorkSpin(machine, MAX_NS)
    batch, gap, now = 2500 * US, 400 * US, 5 * S
    for number in range(10):
        assert not spin.goes_on(now, True), "a batch takes longer than is spun for"
        now += batch
        spin.found(now)
        assert spin.goes_on(now, False) == (number > 0), "the next call has come soon every time"
        assert machine.spinning == (number > 0)
        now += gap
        assert spin.goes_on(now - 1, False) == (number > 0)
        spin.found(now)
        assert machine.spinning == 0


def test_what_is_due_is_waited_for_although_its_kind_is_not_spun_for(native: ModuleType) -> None:
    machine = native.Machine()
    spin = native.WorkSpin(machine, MAX_NS)
    assert not spin.goes_on(5 * S, True)
    assert spin.goes_on_until(5 * S, 5 * S + 100 * US)
    assert spin.goes_on(5 * S + 99 * US, True)
    assert not spin.goes_on(5 * S + 100 * US, True)
    assert machine.spinning == 0


def preempted(spin: Any, machine: Any, now: int) -> None:  # noqa: ANN401
    turn = spin.begin(now)
    assert turn.until
    machine.preempted += 1
    spin.end(turn, now)


def test_a_spinner_that_is_preempted_again_and_again_rests_for_a_second(native: ModuleType) -> None:
    spin, machine = spin_of(native, 10 * US)
    now = 5 * S
    for quiet in (5, 10, 20, 40, 80, 160, 320, 640, 1000, 1000):
        preempted(spin, machine, now)
        now += quiet * MS
        assert not spin.begin(now - 1).until
        turn = spin.begin(now)
        assert turn.until
        spin.end(turn, now)


def test_a_spinner_that_is_preempted_rarely_hardly_rests(native: ModuleType) -> None:
    spin, machine = spin_of(native, 10 * US)
    for now in range(5 * S, 6 * S, 25 * MS):
        preempted(spin, machine, now)
        assert not spin.begin(now + 5 * MS - 1).until
        turn = spin.begin(now + 5 * MS)
        assert turn.until
        spin.end(turn, now + 5 * MS)


def test_a_wait_whose_end_is_known_needs_no_gaps(native: ModuleType) -> None:
    spin, machine = spin_of(native)
    assert not spin.begin(5 * S).until
    assert spin.begin_until(5 * S, 5 * S + 7).until == 5 * S + 7
    machine.cpus = 2
    assert not spin.begin_until(7 * S, 7 * S + 7).until
    assert not native.Spin(native.Machine(), 0).begin_until(5 * S, 6 * S).until


def test_throttled_group_rests_for_a_second(native: ModuleType) -> None:
    spin, machine = spin_of(native, 10 * US)
    machine.throttled = 3  # Before our time.
    spin.end(spin.begin(5 * S), 5 * S)
    machine.throttled = 4
    spin.end(spin.begin(5 * S + 1), 5 * S + 1)  # Files are read once a second.
    assert not spin.begin(6 * S).until
    assert spin.begin(7 * S).until


def test_quota_is_the_least_of_all_groups_above(native: ModuleType, tmp_path: Path) -> None:
    groups = tmp_path / "cgroup"
    (groups / "outer" / "inner").mkdir(parents=True)
    (groups / "outer" / "cpu.max").write_text("250000 100000\n")
    (groups / "outer" / "inner" / "cpu.max").write_text("max 100000\n")
    (groups / "outer" / "inner" / "cpu.stat").write_text("usage_usec 1\nnr_periods 9\nnr_throttled 5\n")
    own = tmp_path / "self"
    own.write_text("0::/outer/inner\n")
    found = native.ControlGroups(str(groups), str(own))
    assert found.quota() == 2.5
    assert found.throttles() == 5


def test_quota_of_the_older_version(native: ModuleType, tmp_path: Path) -> None:
    group = tmp_path / "cgroup" / "cpu" / "box"
    group.mkdir(parents=True)
    (group / "cpu.cfs_quota_us").write_text("150000\n")
    (group / "cpu.cfs_period_us").write_text("100000\n")
    own = tmp_path / "self"
    own.write_text("4:memory:/box\n1:cpu,cpuacct:/box\n0::/\n")
    assert native.ControlGroups(str(tmp_path / "cgroup"), str(own)).quota() == 1.5
    (group / "cpu.cfs_quota_us").write_text("-1\n")
    assert native.ControlGroups(str(tmp_path / "cgroup"), str(own)).quota() == float("inf")


@pytest.mark.parametrize("kind", [None, "thread", "address,undefined"])
def test_threads_of_a_pool_look_for_work_before_they_sleep(tmp_path: Path, kind: str | None) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    names = ("control_groups", "cpus", "pool", "spin", "spin_host")
    sources = [NATIVE / "base" / f"{name}.cc" for name in names]
    program = build(
        tmp_path / "race", [ROOT / "tests/native/pool_race.cc", *sources], *(sanitizer(kind) if kind else ("-O2",))
    )
    done = subprocess.run([program, "200" if kind is None else "50"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
