"""vLLM as processes of their own, and the servers that compute its experts."""

import contextlib
import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.support.process import Serving, end, free_port, serving
from tests.system.vllm.environment import variables
from tests.system.vllm.models import EXPERTS, WORDS

START_SECONDS = 120.0
LENGTHS = (1, 2, 3, 5, 9, 17, 33, 60)
TOKENS = 64
PROGRAM = Path(__file__).with_name("generate.py")
HALVES = (f"0-{EXPERTS // 2 - 1}", f"{EXPERTS // 2}-{EXPERTS - 1}")


def prompts() -> list[list[int]]:
    """Eight of different lengths."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, WORDS, (length,), generator=generator).tolist() for length in LENGTHS]


def shard(model: Path, folder: Path, experts: str, port: int = 0) -> AbstractContextManager[Serving]:
    """A server of `experts` in BF16, as the checkpoint has them, with its files in a new folder."""
    folder.mkdir()
    return serving(model, folder, "--experts", experts, "--listen", f"127.0.0.1:{port}", "--weights", "bf16")


@contextlib.contextmanager
def two_servers(model: Path, folder: Path) -> Iterator[str]:
    """The addresses, as the plug-in takes them, of two servers that own half of the experts each."""
    with shard(model, folder / "low", HALVES[0]) as low, shard(model, folder / "high", HALVES[1]) as high:
        yield f"{low.listen},{high.listen}"


@dataclass(frozen=True, slots=True)
class Generated:
    tokens: list[list[int]]
    seconds: float
    """Until the engine could be asked."""
    log: str
    adapted: list[list[int]] = field(default_factory=list)
    """With the adapter."""


def run(
    python: Path, model: Path, folder: Path, servers: str = "", adapter: Path | None = None, **options: object
) -> subprocess.CompletedProcess[str]:
    """vLLM as a library: generates from `prompts` into a file."""
    asked = {"model": str(model), "options": {"enforce_eager": True} | options, "prompts": prompts(), "tokens": TOKENS}
    asked["adapter"] = adapter and str(adapter)
    (folder / "asked.json").write_text(json.dumps(asked))
    command = [str(python), str(PROGRAM), str(folder / "asked.json")]
    return subprocess.run(
        command, env=variables(servers), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=240
    )


def generate(
    python: Path, model: Path, folder: Path, servers: str = "", adapter: Path | None = None, **options: object
) -> Generated:
    done = run(python, model, folder, servers, adapter, **options)
    assert done.returncode == 0, done.stdout[-6000:]
    told = json.loads((folder / "asked.json").read_text())
    return Generated(told["tokens"], told["seconds"], done.stdout, told.get("adapted", []))


class Api:
    """vLLM's OpenAI-compatible server."""

    def __init__(self, address: str, model: Path) -> None:
        self.address = address
        self._model = str(model)

    def health(self) -> int:
        """HTTP status."""
        try:
            with urllib.request.urlopen(f"http://{self.address}/health", timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code

    def ask(self, prompt: Sequence[int], tokens: int, *, stream: bool = False) -> list[int]:
        """The ids that it continues `prompt` with. Raises `urllib.error.HTTPError`."""
        body = {"model": self._model, "prompt": list(prompt), "max_tokens": tokens, "temperature": 0, "stream": stream}
        with self._post("completions", body | {"ignore_eos": True, "return_token_ids": True}) as answer:
            if not stream:
                return list(json.load(answer)["choices"][0]["token_ids"])
            return _streamed(answer)

    def load_adapter(self, name: str, folder: Path) -> None:
        """Raises `urllib.error.HTTPError`."""
        self._post("load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}).close()

    def _post(self, what: str, body: dict[str, Any]) -> Any:  # noqa: ANN401
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"http://{self.address}/v1/{what}", json.dumps(body).encode(), headers)
        return urllib.request.urlopen(request, timeout=120)


def _streamed(answer: Any) -> list[int]:  # noqa: ANN401
    told: list[int] = []
    for line in answer:
        data = line.decode().removeprefix("data: ").strip()
        if data and data != "[DONE]":
            told += json.loads(data)["choices"][0]["token_ids"] or []
    return told


@contextlib.contextmanager
def api(python: Path, model: Path, log: Path, servers: str, *options: str) -> Iterator[Api]:
    """It answers; it is ended at the end."""
    port = free_port()
    command = [
        str(python),
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
    ]
    command += ["--dtype", "bfloat16", "--max-model-len", "256", "--max-num-seqs", "16", *options]
    with (
        log.open("w") as written,
        subprocess.Popen(command, env=variables(servers), stdout=written, stderr=written) as process,
    ):
        try:
            one, deadline = Api(f"127.0.0.1:{port}", model), time.monotonic() + START_SECONDS
            while not _answers(one):
                assert process.poll() is None, log.read_text()[-6000:]
                assert time.monotonic() < deadline, log.read_text()[-6000:]
                time.sleep(0.5)
            yield one
        finally:
            end(process, 60)


def _answers(one: Api) -> bool:
    try:
        return one.health() == 200
    except OSError:
        return False
