"""`expertd tune`: measure both pipelines' configurations on this machine and keep the best in the cache."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn
from torch import Tensor

from expertd.kernels.cutile.base.fp8 import has_fp8
from expertd.kernels.cutile.base.launch import Gpu, hinted
from expertd.kernels.cutile.base.shape import SHAPE_CLASSES, ExpertShape
from expertd.kernels.cutile.dequant.group_gemm import TILES_M, GroupGemmConfig, candidates, group_gemm_kernel
from expertd.kernels.cutile.dequant.layer import DequantConfig, DequantPipeline
from expertd.kernels.cutile.dequant.token_sort import sort_rows
from expertd.kernels.cutile.fast.layer import Workspace, layer_launches
from expertd.kernels.cutile.fast.tiles import LayerConfig
from expertd.kernels.cutile.fast.tiles import candidates as fast_candidates
from expertd.kernels.cutile.pipeline.table import DEFAULT_CACHE, Machine, Table, load_table, store_table
from expertd.kernels.cutile.tools.inputs import random_batch, random_weights
from expertd.kernels.cutile.tools.measure import device_time
from expertd.kernels.cutile.tools.tuner import Tuner, WrongResult
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.oracle.reference import reference_partials, relative_error
from expertd.kernels.weights.files import write_json

DEQUANT_ERROR = 1e-3
FAST_ERROR = 3e-2
"""Relative errors that a right result stays below."""
ACTIVE_EXPERTS = (1, 2, 4, 8)
"""Batches on which the threshold for grouped products is measured."""
THRESHOLDS = (1, 2, 3, 5, 9)
Product = Literal["up_gate", "down"]
Pipeline = Literal["fast", "dequant"]
PIPELINES: tuple[Pipeline, ...] = ("fast", "dequant")
PRODUCTS: tuple[Product, ...] = ("up_gate", "down")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    defaults = ExpertShape()
    parser.add_argument(
        "--experts", type=int, default=defaults.num_experts, help="local experts (default: %(default)s)"
    )
    parser.add_argument("--hidden-size", type=int, default=defaults.hidden_size, help="default: %(default)s")
    parser.add_argument(
        "--intermediate-size", type=int, default=defaults.intermediate_size, help="default: %(default)s"
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=list(SHAPE_CLASSES), help="batch sizes (default: every shape class)"
    )
    parser.add_argument("--budget", type=float, default=600.0, help="seconds to measure for (default: %(default)s)")
    parser.add_argument("--again", action="store_true", help="measure what is known already, too")
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="default: %(default)s")
    parser.add_argument(
        "--export", type=Path, help="also write the choices to this file, in the form of shipped tables"
    )


def run(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("expertd tune: torch sees no CUDA device", file=sys.stderr)
        return 1
    machine = Machine.detect()
    table = Table() if args.again else load_table(machine, args.cache)
    shape = ExpertShape(args.experts, args.hidden_size, args.intermediate_size)
    columns = (SpinnerColumn(), *Progress.get_default_columns(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("tuning", total=len(args.tokens))
        tuner = Tuner(table, args.budget, report=progress.console.print)
        bench = TuningBench(shape, torch.device("cuda"))
        for tokens in args.tokens:
            progress.update(task, description=f"{tokens} tokens")
            tune_layer(tuner, bench, tokens)
            store_table(table, machine, args.cache)
            progress.advance(task)
    if args.export:
        write_json(table.to_json(), args.export)
    return 0


def tune_layer(tuner: Tuner, bench: TuningBench, tokens: int) -> Pipeline:
    """Choose the configuration of each pipeline for one shape class, and the faster pipeline."""
    key = bench.shape.key(tokens)
    dequant = tune_dequant(tuner, bench, tokens)
    if not has_fp8(bench.gpu.arch):
        return "dequant"
    fast = tuner.best("fast", key, fast_candidates(bench.gpu.arch, tokens), partial(bench.fast, tokens))
    times = {"fast": partial(bench.fast, tokens, fast), "dequant": partial(bench.dequant, tokens, dequant)}
    return tuner.best("pipeline", key, PIPELINES, lambda name: times[name]())


def tune_dequant(tuner: Tuner, bench: TuningBench, tokens: int) -> DequantConfig:
    """Choose each product's configuration for every row tile, then the row tile, then the threshold for grouping."""
    key = bench.shape.key(tokens)
    configs = []
    for tile_m in TILES_M:
        if gemms := candidates(bench.gpu.arch, tile_m):
            up_gate, down = (
                tuner.best(f"group_gemm.{name}.m{tile_m}", key, gemms, partial(bench.product, tokens, tile_m, name))
                for name in PRODUCTS
            )
            configs.append(DequantConfig(tile_m, up_gate, down))
    fastest = tuner.best("dequant.tiles", key, configs, partial(bench.dequant, tokens))
    thresholds = [replace(fastest, group_from=threshold) for threshold in THRESHOLDS]
    return tuner.best("dequant", key, thresholds, partial(bench.few_experts, tokens))


class TuningBench:
    """Checks and times the pipelines on random weights of one shape."""

    def __init__(self, shape: ExpertShape, device: torch.device) -> None:
        self.gpu = Gpu.of(device)
        self.shape = shape
        self._device = device
        self._weights = random_weights(shape, device)
        self._pipeline = DequantPipeline(
            shape.num_experts, shape.hidden_size, shape.intermediate_size, device, self.gpu
        )
        self._cases: dict[int, tuple[TokenBatch, Tensor]] = {}
        self._few: dict[tuple[int, int, bool], float] = {}

    def product(self, tokens: int, tile_m: int, name: Product, gemm: GroupGemmConfig) -> float:
        """Microseconds of one of the layer's two products."""
        config = DequantConfig(tile_m, gemm, gemm)
        batch, _ = self._checked(tokens, config)
        active = min(self.shape.num_experts, batch.expert_ids.numel())
        rows = sort_rows(batch.expert_ids, self.shape.num_experts, active, tile_m)
        launches, _ = self._pipeline.grouped(batch, rows, self._weights, config)
        for launch in launches:
            launch()
        kernel = hinted(group_gemm_kernel, gemm.num_worker_warps, gemm.occupancy)
        products = [launch for launch in launches if launch.kernel is kernel]
        return device_time(products[PRODUCTS.index(name)])

    def dequant(self, tokens: int, config: DequantConfig) -> float:
        """Microseconds of a layer in the dequant pipeline, with uniform routing."""
        batch, _ = self._checked(tokens, config)
        return device_time(lambda: self._pipeline(batch, self._weights, config))

    def fast(self, tokens: int, config: LayerConfig) -> float:
        """Microseconds of a layer in the fast pipeline, with uniform routing."""
        batch, reference = self._case(tokens)
        top_k = batch.expert_ids.shape[1]
        workspace = Workspace.allocate(tokens, top_k, self._weights, config.tile_rows, self._device)
        sums = torch.full_like(reference, torch.nan)
        launches = layer_launches(batch, self._weights, sums, workspace, config, self.gpu.processors)

        def layer() -> None:
            for launch in launches:
                launch()

        layer()
        _check(sums, reference, FAST_ERROR)
        return device_time(layer)

    def few_experts(self, tokens: int, config: DequantConfig) -> float:
        """Microseconds of a layer with uniform routing, and of one for each of `ACTIVE_EXPERTS`, all together.

        In the latter every token goes to one of so many experts, and the pipeline is told how many they are.
        """
        return self.dequant(tokens, config) + sum(
            self._few_experts(tokens, config, active) for active in ACTIVE_EXPERTS
        )

    def _few_experts(self, tokens: int, config: DequantConfig, active: int) -> float:
        bound = min(active, tokens, self.shape.num_experts)
        case = (tokens, bound, bound < config.group_from)
        if case not in self._few:
            batch, _ = self._case(tokens)
            ids = torch.full_like(batch.expert_ids, -1)
            ids[:, 0] = torch.arange(tokens, device=self._device) % bound
            batch = replace(batch, expert_ids=ids)
            _check(self._pipeline(batch, self._weights, config, bound).sums, self._reference(batch), DEQUANT_ERROR)
            self._few[case] = device_time(lambda: self._pipeline(batch, self._weights, config, bound))
        return self._few[case]

    def _checked(self, tokens: int, config: DequantConfig) -> tuple[TokenBatch, Tensor]:
        """A batch for which `config` was seen to compute the reference."""
        batch, reference = self._case(tokens)
        _check(self._pipeline(batch, self._weights, config).sums, reference, DEQUANT_ERROR)
        return batch, reference

    def _case(self, tokens: int) -> tuple[TokenBatch, Tensor]:
        if tokens not in self._cases:
            batch = random_batch(self.shape, tokens, self._device)
            if not (batch.expert_ids >= 0).any():
                batch.expert_ids[0, 0] = 0
            self._cases = {tokens: (batch, self._reference(batch))}
        return self._cases[tokens]

    def _reference(self, batch: TokenBatch) -> Tensor:
        return reference_partials(batch, self._weights, torch.float32)


def _check(sums: Tensor, reference: Tensor, bound: float) -> None:
    error = relative_error(sums, reference)
    if not error <= bound:
        raise WrongResult(f"the relative error is {error:.2e}, above {bound}")
