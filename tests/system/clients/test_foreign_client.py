"""Clients in other languages, written from the .proto alone, get the oracle's answers."""

import asyncio
import base64
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from torch import Tensor

from expertd.client.tools.cluster import LocalCluster
from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.kernels.numerics.backend import LayerWeights, TokenBatch
from expertd.kernels.numerics.quantize import quantize_activations
from expertd.kernels.oracle.reference import reference_partials, relative_error
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import load_layer
from expertd.kernels.weights.files import cache_folder
from tests.support.programs import find_program, node_modules

ROOT = Path(__file__).parents[3]
NODE = ROOT / "client" / "examples" / "node"
CPP = ROOT / "client" / "examples" / "cpp"
CPP_PACKAGES = "cmake g++ libgrpc++-dev libprotobuf-dev pkg-config protobuf-compiler-grpc"
MODEL = DemoModel(
    hidden_size=256,
    moe_intermediate_size=128,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=2,
    topk_group=2,
)
OWNED = range(8, 16)
LAYER = 2
TOKENS = 23
TOLERANCE = 1e-5
RPCS = ("Execute", "ExecuteStream")
LANE = "SharedMemory"
FP8, BF16 = "DTYPE_FLOAT8_E4M3FN", "DTYPE_BFLOAT16"


@dataclass(frozen=True)
class Batch:
    """Tokens for one server, as the client's input file has them."""

    hidden: Tensor
    """[T, H] float32."""
    ids: Tensor
    """[T, k] global expert ids, -1 for none."""
    weights: Tensor
    """[T, k] float32."""

    def write(self, file: Path) -> None:
        content = {
            "layer": LAYER,
            "hidden": self.hidden.tolist(),
            "ids": self.ids.tolist(),
            "weights": self.weights.tolist(),
        }
        file.write_text(json.dumps(content))


@dataclass(frozen=True)
class Outcome:
    """How one run of the client ended."""

    code: int
    stdout: str
    stderr: str
    results: dict[tuple[str, str], dict[str, Any]]
    """By RPC and hidden dtype; empty without an output file."""


@dataclass(frozen=True)
class Program:
    """How to start a client; all of them take the same arguments and files."""

    command: tuple[str, ...]
    environment: dict[str, str]
    rpcs: tuple[str, ...] = RPCS


async def _run(
    command: Sequence[str], folder: Path, environment: dict[str, str], timeout: float = 120
) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=folder,
        env=os.environ | environment,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        stdout, stderr = await asyncio.wait_for(process.communicate(), timeout)
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return process.returncode, stdout.decode(), stderr.decode()


async def _node_client() -> Program:
    """client.js."""
    node, packages = find_program("node", package="nodejs"), node_modules(NODE / "package.json")
    return Program((node, str(NODE / "client.js")), {"NODE_PATH": str(packages), "NO_COLOR": "1"})


async def _cpp_client() -> Program:
    """client.cc, built once for every content of its sources."""
    for tool in ("cmake", "c++", "pkg-config", "protoc", "grpc_cpp_plugin"):
        find_program(tool, package=CPP_PACKAGES)
    if subprocess.run(["pkg-config", "--exists", "grpc++", "protobuf"], check=False).returncode:
        pytest.skip(f"needs gRPC for C++ (Debian: apt-get install {CPP_PACKAGES})")
    own = (file for file in sorted(CPP.iterdir()) if file.suffix in (".cc", ".h", ".txt"))
    sources = (*own, ROOT / "proto" / "expert_shard.proto")

    async def build(staged: Path) -> None:
        for command in (["cmake", "-S", str(CPP), "-B", "."], ["cmake", "--build", "."]):
            code, stdout, stderr = await _run(command, staged, {}, timeout=600)
            assert code == 0, f"{' '.join(command)} failed: {stdout}{stderr}"

    folder = await _made_once("cpp-client", b"".join(source.read_bytes() for source in sources), build)
    return Program((str(folder / "client"),), {}, (*RPCS, LANE))


async def _made_once(kind: str, sources: bytes, make: Callable[[Path], Awaitable[None]]) -> Path:
    """A folder in the cache that `make` filled, for every content of `sources`."""
    final = cache_folder() / kind / hashlib.sha256(sources).hexdigest()[:16]
    if not final.exists():
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=final.parent) as partial:
            staged = Path(partial) / "client"
            staged.mkdir()
            await make(staged)
            _move_into_place(staged, final)
    return final


def _move_into_place(staged: Path, final: Path) -> None:
    try:
        staged.rename(final)
    except OSError:
        # Another test run finished first.
        if not final.exists():
            raise


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("checkpoint"), MODEL)


@pytest.fixture(scope="module")
def weights(checkpoint: Path) -> LayerWeights:
    with Checkpoint(checkpoint) as opened:
        return load_layer(opened, LAYER, OWNED, lambda count: None)


class Client:
    """A client, pointed at one server."""

    def __init__(self, program: Program, address: str, folder: Path) -> None:
        self.rpcs = program.rpcs
        self._program = program
        self._address = address
        self._folder = folder

    async def demonstrate(self) -> Outcome:
        return await self._run([])

    async def compute(self, batch: Batch) -> Outcome:
        batch.write(self._folder / "input.json")
        return await self._run(["--input", "input.json", "--output", "output.json"])

    async def _run(self, options: Sequence[str]) -> Outcome:
        output = self._folder / "output.json"
        output.unlink(missing_ok=True)
        command = [*self._program.command, self._address, *options]
        code, stdout, stderr = await _run(command, self._folder, self._program.environment)
        results = json.loads(output.read_text())["results"] if output.exists() else []
        return Outcome(code, stdout, stderr, {(result["rpc"], result["hidden_dtype"]): result for result in results})


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def address(checkpoint: Path) -> AsyncIterator[str]:
    async with LocalCluster(checkpoint, [f"{OWNED[0]}-{OWNED[-1]}"], ["--backend", "torch"]) as cluster:
        yield cluster.addresses[0]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[_node_client, _cpp_client], ids=["node", "cpp"])
async def program(request: pytest.FixtureRequest) -> Program:
    client: Program = await request.param()
    return client


@pytest.fixture
def client(program: Program, address: str, tmp_path: Path) -> Client:
    return Client(program, address, tmp_path)


def _batch(tokens: int = TOKENS) -> Batch:
    """Tokens of many magnitudes, ties and zeros among them, each with experts that the server does not get."""
    generator = torch.Generator().manual_seed(5)
    blocks = torch.randn(tokens, MODEL.hidden_size // 128, 128, generator=generator)
    magnitudes = torch.logspace(-12, 2, tokens * blocks.shape[1]).view(tokens, -1, 1)
    hidden = (blocks * magnitudes).view(tokens, -1)
    hidden[4:6] = _around_fp8_ties()
    hidden[6:8] = _around_fp8_ties() * 0.3
    hidden[8:10] = _bf16_ties(hidden[10:12])
    hidden[2, :128] = 0
    choice = torch.rand(tokens, len(OWNED), generator=generator).argsort(dim=-1)[:, :4]
    ids = choice + OWNED[0]
    ids[torch.rand(ids.shape, generator=generator) < 0.3] = -1
    ids[3] = -1
    return Batch(hidden, ids, torch.rand(tokens, 4, generator=generator))


def _around_fp8_ties() -> Tensor:
    """[2, 256] float32, blocks of scale 1: every value halfway between two FP8 neighbours, and those just beside it."""
    neighbours = torch.arange(126, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    ties = (neighbours[:-1] + neighbours[1:]) / 2
    below, above = (torch.nextafter(ties, torch.tensor(toward)) for toward in (0.0, torch.inf))
    edges = torch.tensor([448.0, -448.0, -0.0])
    return torch.stack([torch.cat([edges, values]) for values in (ties, -ties, below, above)]).view(2, 256)


def _bf16_ties(values: Tensor) -> Tensor:
    """The float32 values halfway between the BF16 neighbours that begin with the bits of `values`."""
    return (values.view(torch.int32) & ~0xFFFF | 0x8000).view(torch.float32)


def _bytes_sent(result: dict[str, Any], dtype: torch.dtype) -> Tensor:
    data = bytearray(base64.b64decode(result["hidden"]))
    return torch.frombuffer(data, dtype=dtype).view(-1, MODEL.hidden_size)


def _expected(batch: Batch, hidden: Tensor, scales: Tensor | None, weights: LayerWeights) -> Tensor:
    """[T, H] float64: the oracle's answer to `batch` when `hidden` and `scales` are what is sent."""
    local = torch.where(batch.ids >= 0, batch.ids - OWNED[0], -1).to(torch.int32)
    return reference_partials(TokenBatch(hidden, scales, local, batch.weights), weights)


def _assert_answers(outcome: Outcome, hidden_dtype: str, expected: Tensor, batch: Batch) -> None:
    counts = {str(expert): int((batch.ids == expert).sum()) for expert in OWNED}
    for (rpc, dtype), result in outcome.results.items():
        if dtype != hidden_dtype:
            continue
        partials = torch.tensor(result["partials"])
        assert partials.shape == expected.shape
        assert relative_error(partials, expected) <= TOLERANCE
        for token, (found, wanted) in enumerate(zip(partials, expected, strict=True)):
            assert relative_error(found, wanted) <= TOLERANCE, f"{rpc}, token {token}"
        assert result["receipt"] == {expert: count for expert, count in counts.items() if count}


async def test_fp8_answers_are_the_oracles(client: Client, weights: LayerWeights) -> None:
    batch = _batch()
    outcome = await client.compute(batch)
    assert outcome.code == 0, outcome.stderr
    stored, scales = quantize_activations(batch.hidden)
    for rpc in client.rpcs:
        result = outcome.results[rpc, FP8]
        assert torch.equal(_bytes_sent(result, torch.uint8), stored.view(torch.uint8))
        assert torch.equal(torch.tensor(result["scales"]).view_as(scales), scales)
    _assert_answers(outcome, FP8, _expected(batch, stored, scales, weights), batch)


async def test_bf16_answers_are_the_oracles(client: Client, weights: LayerWeights) -> None:
    batch = _batch()
    outcome = await client.compute(batch)
    assert outcome.code == 0, outcome.stderr
    hidden = batch.hidden.bfloat16()
    for rpc in client.rpcs:
        result = outcome.results[rpc, BF16]
        assert torch.equal(_bytes_sent(result, torch.int16), hidden.view(torch.int16))
        assert result["scales"] == []
    _assert_answers(outcome, BF16, _expected(batch, hidden, None, weights), batch)


async def test_streams_and_lanes_carry_several_requests(client: Client) -> None:
    outcome = await client.compute(_batch())
    assert set(outcome.results) == {(rpc, hidden_dtype) for rpc in client.rpcs for hidden_dtype in (FP8, BF16)}
    for (rpc, _), result in outcome.results.items():
        assert result["request_ids"] == ([1] if rpc == "Execute" else [1, 2, 3, 4])


async def test_without_files_it_shows_the_server_and_computes_noise(client: Client) -> None:
    outcome = await client.demonstrate()
    assert outcome.code == 0, outcome.stderr
    assert re.search(r"""model_type: ['"]deepseek_v3['"]""", outcome.stdout)
    for rpc in client.rpcs:
        for hidden_dtype in (FP8, BF16):
            assert f"{rpc} {hidden_dtype}: norms" in outcome.stdout
    pairs = re.findall(r"pairs by expert (.*)", outcome.stdout)
    assert [json.loads(counts) for counts in pairs] == [{"8": 5, "9": 5, "10": 5, "11": 5}] * 2 * len(client.rpcs)


def _bad_tokens() -> dict[str, tuple[Batch, str]]:
    """One token that cannot be computed, and what must be said of it."""
    hidden, ids, weights = torch.ones(1, MODEL.hidden_size), torch.tensor([[8, 9, -1, 10]]), torch.ones(1, 4)

    def with_ids(*given: int) -> Batch:
        return Batch(hidden, torch.tensor([given]), weights)

    return {
        "an expert beyond the model": (
            with_ids(8, 9, 16, 10),
            "INVALID_ARGUMENT: expert_ids[0, 2] is 16; it must be -1 or from 0 to 15",
        ),
        "an expert below -1": (
            with_ids(-2, 8, 9, 10),
            "INVALID_ARGUMENT: expert_ids[0, 0] is -2; it must be -1 or from 0 to 15",
        ),
        "an expert twice": (
            with_ids(9, -1, 8, 9),
            "INVALID_ARGUMENT: expert_ids[0] is [9, -1, 8, 9]; a token may name an expert at most once",
        ),
        "an expert of another server": (
            with_ids(8, 9, 10, 3),
            "NOT_FOUND: expert_ids[0, 3] is 3; this server owns experts 8-15 of layer 2",
        ),
        "too many slots": (
            Batch(hidden, torch.tensor([[8, 9, 10, 11, 12]]), torch.ones(1, 5)),
            "INVALID_ARGUMENT: top_k is 5; it must be from 1 to 4",
        ),
        "too few weights": (
            Batch(hidden, ids, weights[:, :3]),
            "INVALID_ARGUMENT: weights has 12 bytes; [1, 4] float32 takes 16",
        ),
        "an infinite weight": (
            Batch(hidden, ids, torch.tensor([[1, 1e39, 1, 1]], dtype=torch.float64)),
            "INVALID_ARGUMENT: weights[0, 1] is inf; it must be finite",
        ),
    }


@pytest.mark.parametrize(("batch", "message"), _bad_tokens().values(), ids=_bad_tokens())
async def test_a_bad_request_is_refused_by_name(client: Client, batch: Batch, message: str) -> None:
    outcome = await client.compute(batch)
    assert outcome.code == 1
    # A lane's server sees no lengths of tensors: its caller looks.
    unseen = message.replace("; [1, 4] float32 takes 16", "; the server would read 16")
    assert {key: result["error"] for key, result in outcome.results.items()} == {
        (rpc, hidden_dtype): unseen if rpc == LANE else message for rpc in client.rpcs for hidden_dtype in (FP8, BF16)
    }


async def test_hidden_states_of_another_size_are_refused_by_name(client: Client) -> None:
    outcome = await client.compute(Batch(torch.ones(1, 128), torch.tensor([[8]]), torch.ones(1, 1)))
    assert outcome.code == 1
    for rpc in RPCS:
        assert outcome.results[rpc, FP8]["error"] == (
            "INVALID_ARGUMENT: hidden_scales has 4 bytes; [1, 2] float32 takes 8"
        )
        assert outcome.results[rpc, BF16]["error"] == (
            "INVALID_ARGUMENT: hidden has 256 bytes; [1, 256] bfloat16 takes 512"
        )
    for hidden_dtype, sizes in ((FP8, (128, 256)), (BF16, (256, 512))) if LANE in client.rpcs else ():
        expected = "INVALID_ARGUMENT: hidden has {} bytes; the server would read {}".format(*sizes)
        assert outcome.results[LANE, hidden_dtype]["error"] == expected


async def test_without_shared_memory_there_are_the_other_ways(
    program: Program, checkpoint: Path, tmp_path: Path
) -> None:
    options = ["--backend", "torch", "--shared-memory-bytes", "0"]
    async with LocalCluster(checkpoint, [f"{OWNED[0]}-{OWNED[-1]}"], options) as cluster:
        outcome = await Client(program, cluster.addresses[0], tmp_path).compute(_batch())
    assert outcome.code == 0, outcome.stderr
    assert {rpc for rpc, _ in outcome.results} == set(RPCS)
    if LANE in program.rpcs:
        assert "no shared memory: PERMISSION_DENIED: " in outcome.stdout


async def test_no_server_is_said_so(program: Program, tmp_path: Path) -> None:
    outcome = await Client(program, "127.0.0.1:1", tmp_path).demonstrate()
    assert outcome.code == 1
    assert outcome.stderr.startswith("UNAVAILABLE: ")
