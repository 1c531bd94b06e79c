"""docs/tour.ipynb runs to its end, says no more on standard error than it tells of, and leaves nothing behind.

It is kept without outputs: they would show one machine's times, and go stale without anybody seeing it.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from traitlets.config import Config

from tests.docs.fences import ROOT

TOUR = ROOT / "docs" / "tour.ipynb"
SECONDS = 600
"""For a cell."""


def tour() -> NotebookNode:
    notebook: NotebookNode = nbformat.read(TOUR, as_version=4)  # type: ignore[no-untyped-call]
    return notebook


async def execute(notebook: NotebookNode, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run all cells as Jupyter does; temporary files, sockets and Jupyter's own go to `folder`."""
    for name in ("TMPDIR", "IPYTHONDIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(folder))
    config = Config({"KernelManager": {"transport": "ipc", "ip": str(folder / "kernel")}})
    resources = {"metadata": {"path": str(TOUR.parent)}}
    await NotebookClient(notebook, timeout=SECONDS, config=config, resources=resources).async_execute()


def processes(folder: Path) -> list[str]:
    """Command lines in which something in `folder` is named."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue  # ended meanwhile
    return [line for line in lines if str(folder) in line]


async def test_the_tour_runs_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = tour()
    await execute(notebook, tmp_path, monkeypatch)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    complaints = "".join(output.text for output in outputs if output.get("name") == "stderr").splitlines()
    # Of the server that is killed, of others where the machine has no time for them, and on a machine's first plot.
    expected = ("is out of use", "is in use", "font cache")
    assert [line for line in complaints if not any(part in line for part in expected)] == []
    said = "".join(output.get("text", "") for output in outputs)
    assert re.search(r"every expert has 2 to 2 owners\nOK.*OK: 0 of 128 experts past a bound", said, re.S)
    assert "{'low': 0, 'high': 0, 'all': 0}" in said
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert processes(tmp_path) == []
    assert not list(tmp_path.glob("expertd-tour-*"))


async def test_a_cell_that_fails_is_told_and_no_server_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = tour()
    serving = next(index for index, cell in enumerate(notebook.cells) if "subprocess.Popen" in cell.source)
    notebook.cells[serving + 1 :] = notebook.cells[serving + 1 :][:2]
    notebook.cells[-1].source = "assert not [one.pid for one in servers.values()], 'three run'"
    with pytest.raises(CellExecutionError, match="three run"):
        await execute(notebook, tmp_path, monkeypatch)
    assert processes(tmp_path) == []


def test_it_is_kept_without_outputs() -> None:
    code = [cell for cell in tour().cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code), "clear all outputs before you commit it"


def test_its_links_lead_somewhere() -> None:
    text = "\n".join(cell.source for cell in tour().cells if cell.cell_type == "markdown")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    assert targets
    assert [target for target in targets if not (TOUR.parent / target).exists()] == []
