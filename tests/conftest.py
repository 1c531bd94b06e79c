"""Checkpoints that many tests read, and the fence around what may be skipped."""

import faulthandler
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

# Some tests fork; expertd says the same.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
# Before expertd, which would silence it: servers in this process are to speak as they do in their own.
import grpc  # noqa: F401
import pytest
import torch

from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from tests.parts import by_parts, give_way, in_order, table
from tests.support.families import CONFIGS, SMALL, FamilyFolders, write_family
from tests.support.markers import fence_stands, fenced

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

# Threads that wait for each other by spinning take the processor from the servers under test.
torch.set_num_threads(1)
CRASH = (
    os.open(f"{path}.{os.getpid()}", os.O_WRONLY | os.O_CREAT)
    if (path := os.environ.get("EXPERTD_CRASH_FILE"))
    else None
)
"""Where the running test, and the threads of a crash, are written for `.ci/run` to show: of each process apart."""
USUAL = os.getpriority(os.PRIO_PROCESS, 0)


@pytest.hookimpl(trylast=True)
def pytest_configure() -> None:
    """After pytest's own, which writes to a terminal that shows no more than a crash's last lines."""
    if CRASH is not None:
        faulthandler.enable(CRASH)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: "Producer") -> "LoadScopeScheduling":
    return by_parts(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        in_order(items)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if hasattr(item.config, "workerinput"):
        give_way(item, USUAL)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if terminalreporter.config.getoption("numprocesses", None):
        told = (one for many in terminalreporter.stats.values() for one in many if isinstance(one, pytest.TestReport))
        terminalreporter.section("parts")
        for line in table(told):
            terminalreporter.write_line(line)


def pytest_runtest_logstart(nodeid: str) -> None:
    if CRASH is not None:
        os.ftruncate(CRASH, 0)
        os.lseek(CRASH, 0, os.SEEK_SET)
        os.write(CRASH, f"{nodeid}\n".encode())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return fenced((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return fenced((yield))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Failures are read at once: a long run that is cut off has no summary."""
    # Of several processes only the one that hears of all.
    if report.failed and fence_stands() and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid} failed in its {report.when}:\n{report.longreprtext}", file=sys.__stderr__, flush=True)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 experts, top 4 of 2 of 4 groups, H 256, I 128, MoE layers 1 and 2, FP8."""
    return write_demo_checkpoint(tmp_path_factory.mktemp("models"), SMALL)


@pytest.fixture(scope="session", params=CONFIGS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyFolders:
    """A small model of each family beside DeepSeek-V3: 16 experts, H 256, I 128."""
    return write_family(tmp_path_factory.mktemp("family"), request.param)
