"""Stream-ordered calls, whose GPU is Triton's interpreter: the bits of other calls, padded, compacted, in any dtype."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.sync import SyncCoordinator
from expertd.kernels.oracle.reference import relative_error
from expertd.proto.base.errors import InvalidBatch, NotPermitted, UnknownExpert
from tests.support.coordinators import EXACT, EXPERTS, HIDDEN, LAYER, TOP_K, call, on_stream, routing, tokens
from tests.support.fence.markers import no_gpu
from tests.support.fleets import HALVES, addresses, computed_tokens, running_servers
from tests.support.serving import running_server

pytestmark = no_gpu

ALL = range(EXPERTS)


@pytest.mark.parametrize("count", [1, 3, 8, 300])
async def test_sums_are_those_of_other_calls(small_model: Path, count: int) -> None:
    """300 are more than every server gets whole: each has those that it is wanted for."""
    async with running_servers(small_model, HALVES) as servers, Coordinator(addresses(servers), EXACT) as moe:
        await moe.prepare_stream(count, "cpu", timeout=20.0)
        hidden = tokens(count).float()
        ids, weights = routing(count)
        # Whole tokens, and all of one server, go to nobody.
        ids[count // 2] = -1
        ids[ids == count % EXPERTS] = -1
        expected = await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights)
        for choice in (ids, ids.int()):
            assert torch.equal(await on_stream(moe, hidden, choice, weights), expected)
        out = torch.empty_like(hidden)
        assert await on_stream(moe, hidden, ids, weights, out) is out
        assert torch.equal(out, expected)
        await moe.check()


async def test_a_server_that_is_not_wanted_is_not_asked(small_model: Path) -> None:
    async with running_servers(small_model, HALVES) as servers, Coordinator(addresses(servers), EXACT) as moe:
        await moe.prepare_stream(8, "cpu", timeout=5.0)
        hidden, (_, weights) = tokens(2).float(), routing(2)
        ids = torch.arange(TOP_K).repeat(2, 1)
        expected = await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights)
        servers[1].stop()
        assert torch.equal(await on_stream(moe, hidden, ids, weights), expected)


async def test_fp8_is_within_its_bound_and_shapes_are_kept(small_model: Path) -> None:
    """The interpreter truncates to FP8; the GPU's tests compare bits."""
    async with (
        running_server(small_model, ALL) as server,
        Coordinator([str(server.address)], CoordinatorConfig(output_dtype=torch.float32)) as moe,
    ):
        await moe.prepare_stream(64, "cpu", timeout=5.0)
        hidden = tokens(6).float().reshape(2, 3, HIDDEN)
        ids, weights = (part.reshape(2, 3, TOP_K) for part in routing(6))
        expected = await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights)
        got = await on_stream(moe, hidden, ids, weights)
        assert got.shape == hidden.shape
        assert relative_error(got.reshape(6, HIDDEN), expected.reshape(6, HIDDEN)) < 0.1
        await moe.check()


async def test_all_layers_follow_each_other_and_other_calls_go_on(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, Coordinator([str(server.address)], EXACT) as moe:
        await moe.prepare_stream(8, "cpu", timeout=5.0)
        hidden, choice = tokens(2).float(), routing(2)
        expected = {layer: await moe(layer, hidden, topk_ids=choice[0], topk_weights=choice[1]) for layer in moe.layers}
        others = asyncio.gather(*(call(moe, seed) for seed in range(8)))
        for layer in 3 * moe.layers:
            assert torch.equal(await on_stream(moe, hidden, *choice, layer=layer), expected[layer])
        await others


async def test_several_callers_are_served_and_counted(small_model: Path) -> None:
    async with (
        running_server(small_model, ALL) as server,
        Coordinator([str(server.address)], EXACT) as first,
        Coordinator([str(server.address)], EXACT) as second,
    ):
        cases = [(tokens(2, seed).float(), *routing(2, seed)) for seed in range(2)]
        for moe in (first, second):
            await moe.prepare_stream(8, "cpu", timeout=5.0)
        expected = [await first(LAYER, case[0], topk_ids=case[1], topk_weights=case[2]) for case in cases]
        before = computed_tokens(server)
        for _ in range(3):
            # In turn: the interpreter is for one thread at a time.
            for moe, case, right in zip((first, second), cases, expected, strict=True):
                assert torch.equal(await on_stream(moe, *case), right)
        # As what they were padded to.
        assert computed_tokens(server) - before == 3 * 2 * 8


async def test_from_a_thread(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server:
        hidden, (ids, weights) = tokens(2).float(), routing(2)

        def run() -> None:
            with SyncCoordinator([str(server.address)], EXACT) as moe:
                moe.prepare_stream(8, "cpu", timeout=5.0)
                got = moe.on_stream(LAYER, hidden, ids, weights)
                assert torch.equal(got, moe(LAYER, hidden, topk_ids=ids, topk_weights=weights))
                moe.check()
                # Memory is given back, and others may be prepared for.
                moe.prepare_stream(1, "cpu", timeout=5.0)
                assert torch.equal(moe.on_stream(LAYER, hidden[:1], ids[:1], weights[:1]), got[:1])
                assert moe.stream_on_gpu == frozenset()

        await asyncio.to_thread(run)


WRONG: dict[str, dict[str, Any]] = {
    "hidden has 9 tokens; stream-ordered calls were prepared for 8": {"hidden": torch.zeros(9, HIDDEN)},
    "hidden has the shape [2, 128]; it must be [..., 256]": {"hidden": torch.zeros(2, 128)},
    "hidden is torch.int32; it must be bfloat16, float16 or float32": {"hidden": torch.zeros(2, HIDDEN).int()},
    "topk_ids has the shape [2, 3]; 2 tokens take [..., 4]": {"ids": torch.zeros(2, 3).int()},
    "topk_ids is torch.float32; it must be int32 or int64": {"ids": torch.zeros(2, TOP_K)},
    "topk_weights is torch.int64; it must be a float dtype": {"weights": torch.zeros(2, TOP_K).long()},
    "topk_weights is on meta; stream-ordered calls": {"weights": torch.zeros(2, TOP_K, device="meta")},
    "out must be contiguous, of the shape [2, 256], on cpu": {"out": torch.zeros(1, HIDDEN)},
    "layer 9 is on no server; layers served: [1": {"layer": 9},
}


async def test_wrong_arguments_are_named(small_model: Path) -> None:
    async with running_server(small_model, ALL) as server, Coordinator([str(server.address)], EXACT) as moe:
        with pytest.raises(RuntimeError, match="call prepare_stream first"):
            moe.on_stream(LAYER, tokens(2), *routing(2))
        for sizes, message in (((0,), "max_tokens is 0"), ((1 << 20,), "max_tokens is 1048576; .* takes at most 4096")):
            with pytest.raises(InvalidBatch, match=message):
                await moe.prepare_stream(*sizes, "cpu")
        await moe.prepare_stream(8, "cpu", timeout=5.0)
        ids, weights = routing(2)
        for message, wrong in WRONG.items():
            right = {"layer": LAYER, "hidden": tokens(2).float(), "ids": ids, "weights": weights}
            arguments: dict[str, Any] = {**right, **wrong}
            with pytest.raises((InvalidBatch, UnknownExpert)) as raised:
                moe.on_stream(*arguments.values())
            assert message in str(raised.value)
        assert moe.on_stream(LAYER, torch.zeros(0, HIDDEN), ids[:0], weights[:0]).shape == (0, HIDDEN)
        await moe.check()


async def test_servers_that_share_no_memory_are_named(small_model: Path) -> None:
    async with (
        running_server(small_model, ALL) as server,
        Coordinator([str(server.address)], replace(EXACT, shared_memory_bytes=0)) as moe,
    ):
        with pytest.raises(NotPermitted, match=r"127.0.0.1:\d+ shares no memory: stream-ordered calls need"):
            await moe.prepare_stream(8, "cpu")
    async with (
        running_server(small_model, ALL, shared_memory_bytes=0) as server,
        Coordinator([str(server.address)], EXACT) as moe,
    ):
        with pytest.raises(NotPermitted):
            await moe.prepare_stream(8, "cpu")
