"""Callers change torch's default dtype, as loading a model of transformers or vLLM does: no result depends on it."""

import ast
import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertd.client.coordinator import Coordinator
from expertd.kernels.oracle.reference import relative_error
from tests.support.coordinators import EXACT, LAYER, expected, routing, tokens
from tests.support.fleets import HALVES, addresses, running_servers

ROOT = Path(__file__).parents[2]
FLOATS = {f"torch.{name}" for name in ("zeros", "ones", "empty", "rand", "randn", "linspace")}
"""What makes tensors of the default dtype."""
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


def test_every_tensor_of_floats_says_its_dtype() -> None:
    files = (file for room in ("client", "kernels", "server") for file in (ROOT / room).rglob("*.py"))
    # Those are processes of their own.
    files = (file for file in files if not {"tools", "examples"} & set(file.parts))
    silent = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FLOATS
        if not {"dtype", "out"} & {keyword.arg for keyword in node.keywords}
    ]
    assert silent == []
