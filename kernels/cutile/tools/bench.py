"""`expertd bench kernels`: a whole layer's device time on one server, beside what the machine's memory allows."""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from expertd.kernels.cutile.base.launch import Gpu
from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.dequant.layer import DequantConfig, DequantPipeline
from expertd.kernels.cutile.dequant.layer import default_config as default_dequant_config
from expertd.kernels.cutile.fast.layer import Workspace, layer_launches
from expertd.kernels.cutile.fast.tiles import LayerConfig, default_config
from expertd.kernels.cutile.pipeline.table import Machine, Table, load_table
from expertd.kernels.cutile.pipeline.toolchain import Toolchain
from expertd.kernels.cutile.tools.inputs import random_batch, random_weights
from expertd.kernels.cutile.tools.measure import graph_time, kernel_times
from expertd.kernels.cutile.tools.peers import PEERS, Peer, installed
from expertd.kernels.cutile.tools.registry import coordinator_launches, dequant_launches, fast_launches
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics.backend import LayerWeights, TokenBatch
from expertd.kernels.oracle.reference import reference_partials, relative_error
from expertd.kernels.weights.files import check_writable, write_json

MODEL_EXPERTS, TOP_K = 256, 8
LAYERS = 4
"""Copies of the weights that are gone through in turn, so that none is found in the L2 cache."""
UNIFORM_TOKENS = (1, 64, 1024, 4096, 16384)
SKEWED_TOKENS = (1024, 16384)
READ_BYTES = 4 << 30
MATRIX = 8192
CUDA = torch.device("cuda")
Timer = Callable[[Callable[[LayerWeights], object], Sequence[LayerWeights]], float]
"""Microseconds of some work for one layer, from all of the layers in turn."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; times in microseconds."""

    routing: str
    tokens: int
    pairs: int
    active_experts: int
    fast: float
    fast_invariant: float
    dequant: float
    torch: float
    floor: float
    """The larger of the bytes at this run's read bandwidth and the FLOPs at twice its bf16 rate."""
    error: float
    """Relative error of the fast pipeline against the reference in FP32."""


@dataclass(frozen=True, slots=True)
class PeerRow:
    """What a peer takes for a line of the table."""

    peer: str
    version: str
    scope: str
    """What of the layer is timed."""
    routing: str
    tokens: int
    time: float
    """Microseconds; nan where it failed."""
    fast: float
    """Microseconds of the fast pipeline's whole layer on the same batch."""
    error: float
    """Relative error against the reference in FP32; nan where there is no whole layer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=int, nargs="+", default=list(UNIFORM_TOKENS), help="default: %(default)s")
    parser.add_argument("--no-torch", action="store_true", help="leave out the slow pipeline of plain torch operations")
    parser.add_argument("--parts", action="store_true", help="time every kernel of both pipelines instead, by name")
    parser.add_argument(
        "--peers", action="store_true", help="time DeepGEMM, SGLang and vLLM beside it, those that are installed"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements there")


def run(args: argparse.Namespace) -> int:
    try:
        check_writable(args.json)
    except OSError as error:
        tell(f"--json {args.json} cannot be written: {error.strerror}")
        return 1
    if not torch.cuda.is_available():
        tell("torch sees no CUDA device")
        return 1
    if args.parts:
        print_parts(args.tokens, load_table(Machine.detect()))
        return 0
    bandwidth, rate = read_bandwidth(), bf16_rate()
    bench = LayerBench(ExpertShape(), load_table(Machine.detect()), bandwidth, rate)
    cases = [("uniform", tokens) for tokens in args.tokens]
    cases += [(routing, tokens) for tokens in SKEWED_TOKENS if tokens in args.tokens for routing in ("zipf", "one")]
    peers = installed(PEERS, tell) if args.peers else []
    rows, others = [], []
    for routing, tokens in cases:
        print(f"{routing}, {tokens} tokens", file=sys.stderr)
        batch = bench.batch(routing, tokens)
        rows.append(bench.row(routing, batch, with_torch=not args.no_torch))
        others += [bench.peer(peer, module, rows[-1], batch) for peer, module in peers]
    print_table(rows, bandwidth, rate)
    print_peers(others)
    if args.json is not None:
        write_json(as_json(torch.cuda.get_device_name(), bandwidth, rate, rows, others), args.json)
    return 0


def tell(text: str) -> None:
    print(f"expertd bench kernels: {text}", file=sys.stderr)


def as_json(
    gpu: str, bandwidth: float, rate: float, rows: Sequence[Row], peers: Sequence[PeerRow] = ()
) -> dict[str, object]:
    """The machine, its compiler, the rates that floors are of, and what was measured."""
    return {
        "gpu": gpu,
        **asdict(Toolchain.detect()),
        "read_bytes_per_s": bandwidth,
        "bf16_flops_per_s": rate,
        "rows": [asdict(row) for row in rows],
        "peers": [asdict(row) for row in peers],
    }


def print_table(rows: Sequence[Row], bandwidth: float, rate: float) -> None:
    gpu = torch.cuda.get_device_name()
    print(f"{gpu}: read {bandwidth / 1e12:.2f} TB/s, bf16 {MATRIX}^3 {rate / 1e12:.0f} TFLOP/s; times in us")
    print("| routing | tokens | pairs | experts | fast | invariant | dequant | torch | floor | of floor | error |")
    print("|" + " --- |" * 11)
    for row in rows:
        times = (row.fast, row.fast_invariant, row.dequant, row.torch, row.floor)
        numbers = " | ".join(f"{time:.1f}" for time in times)
        counts = f"{row.routing} | {row.tokens} | {row.pairs} | {row.active_experts}"
        print(f"| {counts} | {numbers} | {row.floor / row.fast:.0%} | {row.error:.4f} |")


def print_peers(rows: Sequence[PeerRow]) -> None:
    if not rows:
        return
    print("\n| peer | what is timed | routing | tokens | peer, us | whole layer here, us | error |")
    print("|" + " --- |" * 7)
    for row in rows:
        case = f"{row.peer} {row.version} | {row.scope} | {row.routing} | {row.tokens}"
        print(f"| {case} | {row.time:.1f} | {row.fast:.1f} | {row.error:.4f} |")


def timed_peer(
    peer: Peer,
    module: ModuleType,
    row: Row,
    batch: TokenBatch,
    layers: Sequence[LayerWeights],
    timer: Timer,
) -> PeerRow:
    """What a peer takes; what fails in it is told and leaves its time out, for its interface changes as it likes."""
    time = error = float("nan")
    try:
        work = peer.prepare(module, batch, layers[0])
        sums = work(layers[0])
        if sums is not None:
            error = relative_error(sums, reference_partials(batch, gate_first(layers[0]), torch.float32))
        time = timer(work, layers)
    except Exception as failure:
        # Whatever a package of another's raises: the reader needs the reason, and the other rows.
        tell(f"{peer.name} {peer.version} failed at {row.tokens} tokens: {type(failure).__name__}: {failure}")
    return PeerRow(peer.name, peer.version, peer.scope, row.routing, row.tokens, time, row.fast, error)


def gate_first(weights: LayerWeights) -> LayerWeights:
    """What peers take these weights for: they have the gate's half before the other, and the time is the same."""
    halves = len(weights.up_gate[0]) // 2, len(weights.up_gate_scales[0]) // 2
    matrix = weights.up_gate.view(torch.uint8).roll(halves[0], 1).view(weights.up_gate.dtype)
    return replace(weights, up_gate=matrix, up_gate_scales=weights.up_gate_scales.roll(halves[1], 1))


def print_parts(token_counts: Sequence[int], table: Table) -> None:
    """Microseconds of each kernel with uniform routing, the coordinator's kernels included."""
    shape, gpu = ExpertShape(), Gpu.of(CUDA)
    for tokens in token_counts:
        key = shape.key(tokens)
        fast = table.get("fast", key, LayerConfig) or default_config(gpu.arch, tokens)
        dequant = table.get("dequant", key, DequantConfig) or default_dequant_config(gpu.arch, tokens)
        for pipeline, launches in (
            ("fast", fast_launches(shape, tokens, fast, CUDA, gpu)),
            ("dequant", dequant_launches(shape, tokens, dequant, CUDA, gpu)),
            ("coordinator", coordinator_launches(MoeConfig(), tokens, CUDA)),
        ):
            for kernel, microseconds in kernel_times(launches).items():
                print(f"{tokens:6} tokens  {pipeline:12} {kernel:24} {microseconds:9.1f} us")


class LayerBench:
    """Times layers of one shape, on weights too many for the L2 cache."""

    def __init__(self, shape: ExpertShape, table: Table, bandwidth: float, rate: float) -> None:
        self._shape, self._table = shape, table
        self._bandwidth, self._rate = bandwidth, rate
        self._gpu = Gpu.of(CUDA)
        first = random_weights(shape, CUDA)
        copies = [replace(first, up_gate=first.up_gate.clone(), down=first.down.clone()) for _ in range(LAYERS - 1)]
        self._layers = [first, *copies]
        self._dequant = DequantPipeline(shape.num_experts, shape.hidden_size, shape.intermediate_size, CUDA, self._gpu)

    def batch(self, routing: str, tokens: int) -> TokenBatch:
        return routed(random_batch(self._shape, tokens, CUDA), routing, self._shape.num_experts)

    def peer(self, peer: Peer, module: ModuleType, row: Row, batch: TokenBatch) -> PeerRow:
        return timed_peer(peer, module, row, batch, self._layers, rotated)

    def row(self, routing: str, batch: TokenBatch, with_torch: bool = True) -> Row:
        tokens = batch.num_tokens
        key = self._shape.key(tokens)
        fast = self._table.get("fast", key, LayerConfig) or default_config(self._gpu.arch, tokens)
        dequant = self._table.get("dequant", key, DequantConfig) or default_dequant_config(self._gpu.arch, tokens)
        used = batch.expert_ids[batch.expert_ids >= 0]
        active = len(used.unique())
        invariant = default_config(self._gpu.arch, tokens, batch_invariant=True)
        fast_time, sums = self._fast(batch, fast)
        return Row(
            routing=routing,
            tokens=tokens,
            pairs=len(used),
            active_experts=active,
            fast=fast_time,
            fast_invariant=self._fast(batch, invariant)[0],
            dequant=rotated(lambda weights: self._dequant(batch, weights, dequant, active), self._layers),
            torch=self._torch(batch) if with_torch else float("nan"),
            floor=self._floor(tokens, len(used), active),
            error=relative_error(sums, reference_partials(batch, self._layers[0], torch.float32)),
        )

    def _fast(self, batch: TokenBatch, config: LayerConfig) -> tuple[float, Tensor]:
        workspace = Workspace.allocate(batch.num_tokens, TOP_K, self._layers[0], config.tile_rows, CUDA)
        sums = torch.empty(batch.hidden.shape, dtype=torch.bfloat16, device=CUDA)

        def layer(weights: LayerWeights) -> None:
            for launch in layer_launches(batch, weights, sums, workspace, config, self._gpu.processors):
                launch()

        return rotated(layer, self._layers), sums

    def _torch(self, batch: TokenBatch) -> float:
        """Plain torch operations, expert by expert; host time, because they wait for the device between experts."""
        spans = []
        for weights in self._layers:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            reference_partials(batch, weights, torch.bfloat16)
            end.record()
            torch.cuda.synchronize()
            spans.append(start.elapsed_time(end) * 1000)
        return float(statistics.median(spans[1:]))

    def _floor(self, tokens: int, pairs: int, active: int) -> float:
        """Microseconds of the fewest bytes (active weights, FP8 tokens, BF16 sums) or of the FLOPs."""
        matrices = 3 * self._shape.hidden_size * self._shape.intermediate_size
        moved = active * matrices + 3 * tokens * self._shape.hidden_size
        return 1e6 * max(moved / self._bandwidth, 2 * pairs * matrices / (2 * self._rate))


def routed(batch: TokenBatch, routing: str, experts: int) -> TokenBatch:
    """`batch` with other experts: "uniform" is what it has, "zipf" chances 1/rank of which the local experts have every
    eighth, "one" one local expert a token, always the same. A single token goes to one local expert."""
    ids = batch.expert_ids
    if routing == "zipf":
        chances = 1 / torch.arange(1, MODEL_EXPERTS + 1, device=ids.device)
        chosen = torch.multinomial(chances.expand(len(ids), -1), TOP_K)
        stride = MODEL_EXPERTS // experts
        ids = torch.where(chosen % stride == 0, chosen // stride, -1)
    elif routing == "one" or len(ids) == 1:
        ids = torch.full_like(ids, -1)
        ids[:, 0] = experts - 1
    return replace(batch, expert_ids=ids.to(torch.int32))


def rotated(work: Callable[[LayerWeights], object], layers: Sequence[LayerWeights]) -> float:
    """Median microseconds of `work` for one layer, from replays of a graph that goes through all of them."""
    return graph_time(lambda: [work(weights) for weights in layers]) / len(layers)


def read_bandwidth() -> float:
    """Bytes a second that the device reads."""
    values = torch.ones(READ_BYTES // 4, device=CUDA)
    return READ_BYTES / graph_time(values.sum) * 1e6


def bf16_rate() -> float:
    """FLOPs a second of a large bf16 product of random matrices by the vendor's library."""
    a, b = (torch.randn(MATRIX, MATRIX, device=CUDA).bfloat16() for _ in range(2))
    return 2 * MATRIX**3 / graph_time(lambda: a @ b) * 1e6
