"""Callers change torch's defaults, as loading a model of transformers or vLLM does: no result depends on them."""

import ast
import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.sync import SyncCoordinator
from expertd.kernels.oracle.reference import relative_error
from tests.support.coordinators import EXACT, LAYER, expected, routing, tokens
from tests.support.fleets import HALVES, addresses, running_servers

ROOT = Path(__file__).parents[2]
FLOATS = {f"torch.{name}" for name in ("zeros", "ones", "empty", "rand", "randn", "linspace")}
"""What makes tensors of the default dtype."""
FACTORIES = FLOATS | {f"torch.{name}" for name in ("arange", "full", "tensor")}
"""What makes tensors on the default device."""
ELSEWHERE = {"tools", "examples", "placement", "integrations", "cutile", "oracle"}
"""Rooms that are processes of their own, or whose tensors may be where the caller's are."""
THE_LONG_WAY = 0.99
"""A quantile for hedging, with which no call goes straight."""


@contextlib.contextmanager
def coarse() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("hidden_dtype", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("hedge_quantile", [None, THE_LONG_WAY])
@pytest.mark.parametrize("shared_memory_bytes", [0, EXACT.shared_memory_bytes])
async def test_sums_are_in_fp32(
    small_model: Path, hidden_dtype: torch.dtype, hedge_quantile: float | None, shared_memory_bytes: int
) -> None:
    config = replace(
        EXACT,
        hidden_dtype=hidden_dtype,
        hedge_quantile=hedge_quantile,
        shared_memory_bytes=shared_memory_bytes,
    )
    hidden, (ids, weights) = tokens(20), routing(20)
    async with running_servers(small_model, HALVES) as servers, Coordinator(addresses(servers), config) as moe:
        with coarse():
            output = await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights)
        assert torch.equal(await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights), output)
    assert relative_error(output, expected(small_model)) < (1e-5 if hidden_dtype == torch.bfloat16 else 0.1)


@pytest.mark.parametrize("config", [EXACT, CoordinatorConfig()], ids=["exact", "float8"])
@pytest.mark.parametrize("hedge_quantile", [None, THE_LONG_WAY])
@pytest.mark.parametrize("count", [20, 300])
async def test_results_are_on_the_cpu(
    small_model: Path, config: CoordinatorConfig, hedge_quantile: float | None, count: int
) -> None:
    hidden, (ids, weights) = tokens(count), routing(count)
    routed = {"topk_ids": ids, "topk_weights": weights}
    async with running_servers(small_model, HALVES) as servers:
        config = replace(config, hedge_quantile=hedge_quantile)
        moe = SyncCoordinator(addresses(servers), config)

        def call_here() -> Tensor:
            with moe, torch.device("meta"):
                return moe(LAYER, hidden, **routed)

        here = await asyncio.to_thread(call_here)
        async with Coordinator(addresses(servers), config) as awaiting:
            right = await awaiting(LAYER, hidden, **routed)
            with torch.device("meta"):
                output = await awaiting(LAYER, hidden, **routed)
    assert torch.equal(output, right)
    assert torch.equal(here, right)


def calls_without(argument: str, functions: set[str], rooms: set[str], elsewhere: set[str]) -> list[str]:
    """Where one of `functions` is called without `argument` or `out`."""
    files = (file for room in rooms for file in (ROOT / room).rglob("*.py"))
    return [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in files
        if not elsewhere & set(file.parts)
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in functions
        if not {argument, "out"} & {keyword.arg for keyword in node.keywords}
    ]


def test_every_tensor_of_floats_says_its_dtype() -> None:
    # Those are processes of their own.
    assert calls_without("dtype", FLOATS, {"client", "kernels", "server"}, {"tools", "examples"}) == []


def test_every_tensor_of_callers_says_its_device() -> None:
    assert calls_without("device", FACTORIES, {"client", "kernels"}, ELSEWHERE) == []
