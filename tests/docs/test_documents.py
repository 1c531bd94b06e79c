"""What the documents say works: commands run, links lead somewhere, errors are the code's, alerts are explained."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

import pytest
import pytest_asyncio
import torch

from expertd.client.tools.cluster import LocalCluster, LocalServer
from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from tests.docs.fences import DOCUMENTS, ROOT, UNTIL_STOPPED, Fence
from tests.support.programs import find_program

MODEL = DemoModel(hidden_size=256, moe_intermediate_size=128, moe_layers=1, quantized=False)
"""256 experts, top 8 of 4 of 8 groups, as in the documents."""
NEXT_MODEL = replace(MODEL, seed=1)
SOURCES = [path for folder in ("client", "kernels", "proto", "server") for path in (ROOT / folder).rglob("*.py")]
# The engine says what its model says, word by word.
SOURCES += (ROOT / "tests" / "support" / "model").glob("*.py")
PROGRAMS = {"promtool": "prometheus"}
"""What documents may ask for that is neither in the environment nor on every machine, and Debian's package with it."""
ALERTS = ROOT / "deploy" / "prometheus" / "rules" / "alerts.yml"


def names(documents: list[Path]) -> list[str]:
    return [str(document.relative_to(ROOT)) for document in documents]


RUN = [document for document in DOCUMENTS if any(fence.runs_here for fence in Fence.all_of(document.read_text()))]


@dataclass(frozen=True)
class Cluster:
    """Two servers that together own all experts, which the documents call node0 and node1."""

    model: Path
    next_model: Path
    servers: list[LocalServer]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Cluster]:
    models = tmp_path_factory.mktemp("models")
    model, next_model = (write_demo_checkpoint(models, one) for one in (MODEL, NEXT_MODEL))
    options = ["--backend", "torch", "--threads", "1", "--per-expert-metrics"]
    async with LocalCluster(model, ["0-127", "128-255"], options) as started:
        yield Cluster(model, next_model, started.servers)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the repository, with this environment in its .venv."""
    folder = tmp_path / "expertd"
    ignored = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", ".hypothesis", "__pycache__", "node_modules", "build", "dist"
    )
    shutil.copytree(ROOT, folder, symlinks=True, ignore=ignored)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@dataclass
class Reader:
    """Somebody who does what a document says, on one machine that stands for all those in the document."""

    folder: Path
    clone: Path
    cluster: Cluster
    server: asyncio.subprocess.Process | None = None
    replacements: dict[str, str] = field(init=False)
    namespace: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self._log = self.clone.parent / "server.log"
        port, metrics = free_ports(2)
        self.replacements = {
            **{f"node{index}:50051": server.address for index, server in enumerate(self.cluster.servers)},
            **{f"node{index}:9464": urlsplit(one.metrics_url).netloc for index, one in enumerate(self.cluster.servers)},
            "/models/DeepSeek-V3.1": str(self.cluster.next_model),
            "/models/DeepSeek-V3": str(self.cluster.model),
            "50051": str(port),
            "9464": str(metrics),
            # What comes later on the command line wins.
            "expertd serve ": f"expertd serve --listen 127.0.0.1:{port} --metrics 127.0.0.1:{metrics} --threads 1 ",
            # The environment is there already.
            "make ": "make --old-file .venv/.installed ",
        }
        # What the Python of the documents leaves open.
        self.namespace = {
            "layer": 1,
            "hidden": torch.randn(3, MODEL.hidden_size).bfloat16(),
            "ids": torch.stack([torch.randperm(MODEL.n_routed_experts)[:8] for _ in range(3)]),
            "weights": torch.rand(3, 8),
            "prompt": torch.arange(5).unsqueeze(0),
        }

    async def follow(self, fence: Fence) -> None:
        # In one pass: nothing that is put in may be taken for something written.
        written = "|".join(map(re.escape, self.replacements))
        code = re.sub(written, lambda found: self.replacements[found[0]], fence.code)
        if fence.is_shell and "expertd serve " in fence.code:
            await self.stop()
        if fence.language == "python":
            await self._run_python(code)
        elif fence.mark == UNTIL_STOPPED:
            await self._start(code)
        else:
            process = await self._shell(code, asyncio.subprocess.PIPE)
            try:
                output, _ = await asyncio.wait_for(process.communicate(), 300)
            except TimeoutError:
                os.killpg(process.pid, signal.SIGTERM)
                raise
            assert process.returncode == 0, f"line {fence.line}: {code}\n{output.decode()}"

    async def stop(self) -> None:
        """Stop the server, if one runs; it must have drained. A document has one at a time."""
        if self.server is not None:
            self.server.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(self.server.wait(), 60) == 0, self._log.read_text()
            self.server = None

    async def _run_python(self, code: str) -> None:
        compiled = compile(code, "document", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        with contextlib.chdir(self.folder):
            result = eval(compiled, self.namespace)
            if inspect.isawaitable(result):
                await result

    async def _start(self, code: str) -> None:
        with self._log.open("wb") as log:
            # In place of the shell, so that signals reach the server.
            self.server = await self._shell(code.replace("expertd serve", "exec expertd serve"), log)
        for _ in range(1200):
            if "serving on" in self._log.read_text():
                return
            assert self.server.returncode is None, self._log.read_text()
            await asyncio.sleep(0.1)
        pytest.fail(f"no server within two minutes: {code}")

    async def _shell(self, code: str, output: int | IO[bytes]) -> asyncio.subprocess.Process:
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(self.clone / "src"),
        }
        return await asyncio.create_subprocess_exec(
            *("bash", "-euo", "pipefail", "-c", code),
            cwd=self.folder,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.mark.parametrize("document", RUN, ids=names(RUN))
@pytest.mark.filterwarnings("default")
async def test_what_a_document_tells_to_run_works(document: Path, clone: Path, cluster: Cluster) -> None:
    for program, package in PROGRAMS.items():
        if program in document.read_text():
            find_program(program, package=package)
    folder = clone if document.parent.name == "docs" else clone / document.parent.relative_to(ROOT)
    reader = Reader(folder, clone, cluster)
    try:
        for fence in Fence.all_of(document.read_text()):
            if fence.runs_here:
                await reader.follow(fence)
    finally:
        await reader.stop()


async def test_a_command_that_fails_is_told_with_its_line(clone: Path, cluster: Cluster) -> None:
    (fence,) = Fence.all_of("text\n```sh\nexpertd serve --model /nowhere --experts 0\n```\n")
    assert fence.runs_here
    with pytest.raises(AssertionError, match=r"(?s)line 2: .*/nowhere/config\.json does not exist"):
        await Reader(clone, clone, cluster).follow(fence)


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(list(DOCUMENTS)))
def test_every_fence_is_run_or_says_why_not(document: Path) -> None:
    text = document.read_text()
    fences = Fence.all_of(text)
    assert 2 * len(fences) == len(re.findall(r"^\s*```", text, re.M)), "a fence is not recognised; do not indent it"
    for fence in fences:
        where = f"{document.name}, line {fence.line}"
        assert fence.language, f"{where}: say which language it is; text for none"
        if elsewhere := re.fullmatch(r"run by (\S+)", fence.mark):
            assert (ROOT / elsewhere[1]).is_file(), f"{where}: {elsewhere[1]} does not exist"
        else:
            assert fence.mark in ("", UNTIL_STOPPED) or re.fullmatch(r"not run: .{10,}", fence.mark), where


def test_unknown_marks_are_found() -> None:
    fences = Fence.all_of(
        "<!-- not run: -->\n```sh\na\n```\n\n<!-- run by tests/x.py -->\n```python\nb\n```\n```sh\nc\n```\n"
    )
    assert [fence.mark for fence in fences] == ["not run:", "run by tests/x.py", ""]
    assert [fence.runs_here for fence in fences] == [False, False, True]


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(list(DOCUMENTS)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.M | re.S)):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in anchors(linked), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=names(list(DOCUMENTS)))
def test_files_that_are_named_exist(document: Path) -> None:
    assert not absent(document.read_text()), f"{document.name} names files that are not there"


def test_a_file_that_is_gone_is_found() -> None:
    text = "`server/app.py`, server/local.py, `native/base/pool.h`, `kernels/cutile/backend.py`, `no/kernels/gone.py`"
    assert absent(text) == ["server/local.py", "kernels/cutile/backend.py"]


def absent(text: str) -> list[str]:
    """Paths of the repository's files in a text that lead nowhere."""
    named = re.findall(
        r"(?<![\w./-])((?:client|deploy|docs|kernels|native|proto|server|src|tests)/[\w./-]*\.\w+)", text
    )
    return [path for path in named if not (ROOT / path).is_file()]


def anchors(document: Path) -> set[str]:
    """What headings can be linked by, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_errors_in_the_faq_are_those_of_the_code() -> None:
    patterns = [re.compile(pattern) for source in SOURCES for pattern in messages(ast.parse(source.read_text()))]
    quoted = re.findall(r"^### `(.*)`$", (ROOT / "docs" / "faq.md").read_text(), re.M)
    assert len(quoted) > 10
    for error in quoted:
        assert any(pattern.fullmatch(error) for pattern in patterns), f"no code says: {error}"
    assert not any(pattern.fullmatch("expert 3 is on holiday; ask another") for pattern in patterns)


def messages(module: ast.Module) -> Iterator[str]:
    """Patterns of the texts that a module can produce, those of a few words."""
    for node in ast.walk(module):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        known = [part.value if isinstance(part, ast.Constant) else None for part in parts]
        if len("".join(text for text in known if isinstance(text, str)).split()) > 3:
            yield "".join(re.escape(text) if isinstance(text, str) else ".+" for text in known)


def test_every_alert_is_explained() -> None:
    alerts = re.findall(r"^\s*- alert: (\w+)$", ALERTS.read_text(), re.M)
    explained = re.findall(r"^### (Expertd\w+)$", (ROOT / "docs" / "operations.md").read_text(), re.M)
    assert sorted(explained) == sorted(alerts)
