"""One server on two GPUs: its sums are those of one, added in the order of devices, and a lost GPU loses no call."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.shared_memory import SharedMemoryTransport
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.oracle.reference import relative_error
from expertd.server.app import Server
from expertd.server.failpoints import VARIABLE
from tests.support.fence.markers import gpu_only
from tests.support.serving import call_for, random_batch, running_server, until

pytestmark = [gpu_only, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")]
EXPERTS = range(16)
MODEL = DemoModel(
    hidden_size=1024,
    moe_intermediate_size=512,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=1,
    topk_group=1,
    moe_layers=2,
)
BOTH: dict[str, Any] = {"backend": "cutile", "devices": (0, 1), "batch_invariant": True}
ONE: dict[str, Any] = {"backend": "cutile", "batch_invariant": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("model"), MODEL)


def batch(tokens: int, seed: int = 0) -> TokenBatch:
    return random_batch(tokens, 1024, 16, 4, seed=seed)


def only(asked: TokenBatch, first: int, end: int) -> TokenBatch:
    ids = asked.expert_ids
    return replace(asked, expert_ids=ids.masked_fill((ids < first) | (ids >= end), -1))


async def computed(
    server: Server, *asked: TokenBatch, dtype: torch.dtype = torch.float32, room: int = 1 << 28
) -> list[Tensor]:
    """What a server answers to each, in one request, in `room` bytes of shared memory."""
    transport = SharedMemoryTransport(GrpcTransport(str(server.address)), room, room // 2)
    await transport.get_shard(10.0)
    try:
        calls = [call_for(server, one, reply_dtype=dtype, request_id=n + 1) for n, one in enumerate(asked)]
        return [(await transport.execute(call)).partials.clone() for call in calls]
    finally:
        await transport.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
async def test_sums_are_added_in_the_order_of_devices(model: Path, dtype: torch.dtype) -> None:
    sizes = (1, 2, 5, 64, 300, 1500, 4096)
    asked = [batch(tokens) for tokens in sizes]
    async with running_server(model, EXPERTS, **BOTH) as server:
        assert server.node.executor is not None
        print("added on the GPUs:", server.node.executor.adds_on_devices)
        got = await computed(server, *asked, dtype=dtype)
    async with running_server(model, EXPERTS, **ONE) as server:
        halves = [[only(one, 0, 8), only(one, 8, 16)] for one in asked]
        parts = [await computed(server, *pair) for pair in halves]
        whole = await computed(server, *asked)
    for its, (first, second), plain in zip(got, parts, whole, strict=True):
        assert torch.equal(its, (torch.zeros_like(first) + first + second).to(dtype))
        assert relative_error(its.float(), plain) < (1e-5 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize(
    ("devices", "reach"), [((0,), False), ((0, 1), False), ((0, 1), True)], ids=["one GPU", "by the host", "by GPUs"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
async def test_sums_of_a_batch_of_many_parts_are_added(
    tmp_path: Path, dtype: torch.dtype, devices: tuple[int, ...], reach: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSeek-V3's width: a bay has 470 MB of sums, in four parts."""
    if not reach:
        monkeypatch.setattr("expertd.server.scheduling.node.peer_adder", lambda _: None)
    large = write_demo_checkpoint(tmp_path, replace(MODEL, hidden_size=7168, moe_intermediate_size=256, moe_layers=1))
    asked = random_batch(16384, 7168, 16, 4)
    options = ONE | {"devices": devices, "max_tokens_per_request": 16384, "max_batch_tokens": 16384}
    async with running_server(large, EXPERTS, **options) as server:
        first, again = await computed(server, asked, asked, dtype=dtype, room=2 << 30)
    assert torch.equal(first, again)
    async with running_server(large, EXPERTS, **ONE) as server:
        for row in range(0, 16384, 2048):
            rows = slice(row, row + 100)
            scales = None if asked.scales is None else asked.scales[rows]
            few = TokenBatch(asked.hidden[rows], scales, asked.expert_ids[rows], asked.weights[rows])
            assert relative_error(first[rows].float(), (await computed(server, few))[0]) < 4e-3


async def test_bits_do_not_depend_on_the_batch_where_experts_have_copies(model: Path) -> None:
    asked = batch(200)
    async with running_server(model, EXPERTS, **BOTH, device_experts=12) as server:
        (together,) = await computed(server, asked)
        for row in (0, 77, 199):
            one = slice(row, row + 1)
            scales = None if asked.scales is None else asked.scales[one]
            single = TokenBatch(asked.hidden[one], scales, asked.expert_ids[one], asked.weights[one])
            assert torch.equal((await computed(server, single))[0][0], together[row])


async def test_a_lost_gpu_loses_no_call_where_experts_have_copies(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = batch(64)
    async with running_server(model, EXPERTS, **ONE) as server:
        (expected,) = await computed(server, asked)
    monkeypatch.setenv(VARIABLE, "lost_device=0.05,seed=3")
    async with running_server(model, EXPERTS, **BOTH, device_experts=16) as server:
        for _ in range(200):
            (got,) = await computed(server, asked)
            assert relative_error(got, expected) < 1e-5
            if len(server.node.sound) == 1:
                break
        await until(lambda: len(server.node.sound) == 1)
        assert server.info.experts == {layer: tuple(EXPERTS) for layer in server.info.layers}
        (got,) = await computed(server, asked)
        assert relative_error(got, expected) < 1e-5
