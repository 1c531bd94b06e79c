"""How the suite is shared between processes: every test is in one part, and a part is one process's."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.parts import PARTS, PATIENT, ROOT, TIMED, by_parts, in_order, part_of, table


def test_what_is_named_exists_and_is_named_once() -> None:
    named = [place for places in (*PARTS.values(), PATIENT) for place in places]
    assert [place for place in named if not (ROOT / place).exists()] == []
    files = [str(file.relative_to(ROOT)) for place in named for file in (ROOT / place, *(ROOT / place).rglob("*.py"))]
    assert len(set(files)) == len(files)


def test_tests_of_a_part_go_to_one_process_and_those_of_others_by_file() -> None:
    config: Any = SimpleNamespace(getvalue=lambda _: ["popen", "popen"])
    log: Any = SimpleNamespace(loadscopesched=None)
    split = by_parts(config, log)._split_scope
    assert {split(f"{place}/test_x.py::test[a::b]") for place in TIMED if not place.endswith(".py")} == {"timed"}
    assert {split(f"{place}::test") for place in TIMED} == {"timed"}
    assert split("tests/chaos_of_others/test_x.py::test") == "tests/chaos_of_others/test_x.py"
    assert split(f"{PATIENT[0]}::test[1]") == PATIENT[0] == part_of(PATIENT[0])


def test_the_longest_parts_come_first_and_all_else_as_it_was() -> None:
    files = ["tests/a/test_a.py", PATIENT[0], "tests/a/test_a.py", "tests/docs/test_x.py", TIMED[1], "tests/0.py"]
    items: list[Any] = [SimpleNamespace(path=Path(ROOT / file)) for file in files]
    in_order(items)
    assert [str(item.path.relative_to(ROOT)) for item in items] == [
        *(TIMED[1], "tests/docs/test_x.py", PATIENT[0]),
        *("tests/a/test_a.py", "tests/a/test_a.py", "tests/0.py"),
    ]


def test_the_table_says_what_took_how_long_and_how_it_is_run_alone() -> None:
    def report(nodeid: str, when: Any, seconds: float) -> pytest.TestReport:  # noqa: ANN401
        return pytest.TestReport(nodeid, ("", 0, ""), {}, "passed", None, when, duration=seconds)

    reports = [
        report("tests/client/call/test_choice.py::test_a", "setup", 1.0),
        report("tests/client/call/test_choice.py::test_a", "call", 2.0),
        report("tests/client/test_sync.py::test_b", "call", 4.0),
        report("tests/docs/test_tour.py::test_c", "call", 8.4),
    ]
    assert list(table(reports)) == [
        "     8 s     1 tests: pytest tests/docs",
        "     7 s     2 tests: pytest tests/client",
    ]
