"""The suite's parts: what runs beside what in `make test`, and in which order.

    python -m tests.parts

names the files and folders of the first round. A part is one process's, one test after another; a file that is in none
of `PARTS` is a part by itself.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).parents[1]
TIMED = (
    "tests/chaos",
    "tests/client/call/test_resilience.py",
    "tests/client/call/test_silence.py",
    "tests/client/fleet/test_models.py",
    "tests/client/fleet/test_pace.py",
    "tests/client/stream/test_failures.py",
    "tests/client/transport/test_grpc_streams.py",
    "tests/native/test_endings.py",
    "tests/native/test_lanes.py",
    "tests/server/local/test_sparse.py",
    "tests/server/rpc/test_fairness.py",
    "tests/server/scheduling/test_watchdog.py",
    "tests/server/test_serving.py",
    "tests/system/test_hung.py",
    "tests/system/test_processes.py",
)
"""They bound how long something may take."""
PATIENT = (
    "tests/native/test_wheels.py",
    "tests/kernels/cutile/tools/test_compile.py",
    "tests/native/test_build.py",
    "tests/client/stream/test_compiled.py",
)
"""Compilers' work, which may take however long it likes: beside `TIMED` it takes what that leaves of the processors."""
PARTS = {
    "timed": TIMED,
    "containers": ("tests/system/containers",),
    "vllm": ("tests/system/vllm",),
    "alerts": ("tests/drills", "tests/system/deploy/test_monitoring.py"),
    "documents": ("tests/docs",),
}
"""The longest first: all else fills up the time that these leave."""
LAST = 19
"""Niceness of whoever wants what others leave."""


def part_of(file: str) -> str:
    """The part of a test file, whose path is that from the repository's root."""
    return next((name for name, places in PARTS.items() if _is_in(file, places)), file)


def in_order(items: list[pytest.Item]) -> None:
    """Sort tests by parts."""
    order = [*PARTS, *PATIENT]
    items.sort(key=lambda item: order.index(part) if (part := part_of(_file(item))) in order else len(order))


def by_parts(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """What hands parts out, in their order."""
    # Only here: one process does without pytest-xdist.
    from xdist.scheduler import LoadScopeScheduling

    scheduling = LoadScopeScheduling(config, log)
    scheduling._split_scope = lambda nodeid: part_of(nodeid.partition("::")[0])
    return scheduling


def give_way(item: pytest.Item, usual: int) -> None:
    """Let this thread, and what it starts, leave the processors to others where `item` has patience."""
    # Who is not root cannot take its turn back.
    with contextlib.suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, LAST if _file(item) in PATIENT else usual)


def table(reports: Iterable[pytest.TestReport]) -> Iterator[str]:
    """A line for each part, or room of what is in none: its seconds and tests, and what runs it alone."""
    seconds: dict[str, float] = defaultdict(float)
    tests: Counter[str] = Counter()
    for report in reports:
        file = report.nodeid.partition("::")[0]
        part = part_of(file)
        where = " ".join(PARTS[part]) if part in PARTS else file if part in PATIENT else "/".join(Path(file).parts[:2])
        seconds[where] += report.duration
        tests[where] += report.when == "call"
    for where, spent in sorted(seconds.items(), key=lambda one: -one[1]):
        yield f"{spent:6.0f} s {tests[where]:5} tests: pytest {where}"


def _is_in(file: str, places: Iterable[str]) -> bool:
    return any(file == place or file.startswith(f"{place}/") for place in places)


def _file(item: pytest.Item) -> str:
    return str(item.path.relative_to(ROOT))


if __name__ == "__main__":
    print(*TIMED, *PATIENT)
