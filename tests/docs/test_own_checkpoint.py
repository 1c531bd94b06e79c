"""README: an own checkpoint, as transformers saves it, is served and answered as it says, without a foreign word."""

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.fences import ROOT, Fence
from tests.support.families import write_family
from tests.support.generation import write_tokenizer
from tests.support.process import said_until

WORDS = ("Experts", "are")
OURS = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ expertd\.\S+: ")
"""How a line of a server's log begins."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE model in BF16, with a tokenizer of two words."""
    folder = write_family(tmp_path_factory.mktemp("own"), "qwen3_moe").plain
    write_tokenizer(folder, (*WORDS, "?"))
    return folder


def written(checkpoint: Path) -> tuple[list[str], str]:
    """The command and the Python of README."""
    fences = Fence.all_of((ROOT / "README.md").read_text())
    command, code = (fence.code for fence in fences if fence.mark == f"run by {Path(__file__).relative_to(ROOT)}")
    program, *arguments = shlex.split(command.replace("/models/DeepSeek-V3", str(checkpoint)))
    assert program == "expertd"
    return arguments, code.replace("/models/DeepSeek-V3", str(checkpoint))


def test_an_own_checkpoint_is_answered_by_generate_as_readme_says(checkpoint: Path) -> None:
    arguments, code = written(checkpoint)
    command = [sys.executable, "-P", "-m", "expertd.cli", *arguments, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as up:
        try:
            said = said_until(up, "topk_weights=weights)")
            (address, log), *_ = re.findall(r"^  (\S+)  metrics \S+  log (\S+)$", said, re.M)
            assert code.count("127.0.0.1:50051") == 1
            program = code.replace("127.0.0.1:50051", address)
            done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, timeout=600)
            assert done.returncode == 0, done.stderr
            assert done.stdout.startswith(" ".join(WORDS))
            assert done.stdout.count("\n") == 1
            # A machine that has no time for the server may leave it silent for a while.
            silent = re.compile(rf"{address} is (in|out of) use\b")
            assert [line for line in done.stderr.splitlines() if not silent.match(line)] == []
            assert [line for line in Path(log).read_text().splitlines() if not OURS.match(line)] == []
        finally:
            up.send_signal(signal.SIGINT)
            _, complaints = up.communicate(timeout=300)
    assert (up.returncode, complaints) == (0, "")
