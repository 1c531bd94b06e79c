"""Callers whose tensors are on the server's GPU: the bits of gRPC, refusals, and what a killed caller leaves behind."""

import asyncio
import logging
import os
import sys
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio
import torch

from expertd.client.coordinator import Coordinator
from expertd.client.sync import SyncCoordinator
from expertd.client.tools.cluster import LocalCluster
from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.segment import Slot
from expertd.client.transport.shared_memory import HOST
from expertd.kernels.memory.gpu import GpuMemory, GpuMemoryError
from expertd.proto.base.errors import InvalidBatch
from tests.gpu.caller import GPU, MODEL, OPTIONS, connected, gpu_call, host_call
from tests.support.fence.markers import gpu_only

pytestmark = [gpu_only, pytest.mark.asyncio(loop_scope="module")]

CLIENT = """
import asyncio, sys
from tests.gpu.caller import connected, gpu_call

async def main():
    transport, shard = await connected(sys.argv[1])
    async def caller(number):
        for request_id in range(number, 1 << 40, 4):
            await transport.execute(gpu_call(shard, 1024, request_id=request_id))
            print("answered", flush=True)
    await asyncio.gather(*(caller(number) for number in range(4)))

asyncio.run(main())
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    folder = write_demo_checkpoint(tmp_path_factory.mktemp("model"), MODEL)
    async with LocalCluster(folder, ["0-7"], OPTIONS) as cluster:
        yield cluster
    assert cluster.exit_codes == [0]


def shared_bytes(cluster: LocalCluster) -> float:
    with urllib.request.urlopen(cluster.servers[0].metrics_url) as answer:
        text = str(answer.read(), "utf-8")
    return float(text.split("\nexpertd_shared_memory_bytes ")[1].split("\n")[0])


@pytest.mark.parametrize("reply_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float8", "bfloat16"])
async def test_partials_are_those_of_grpc_bit_for_bit(
    cluster: LocalCluster, dtype: torch.dtype | None, reply_dtype: torch.dtype
) -> None:
    transport, shard = await connected(cluster.addresses[0])
    grpc = GrpcTransport(cluster.addresses[0])
    for tokens in (1, 8, 256, 257, 1024):
        expected = await grpc.execute(replace(host_call(shard, tokens, dtype=dtype), reply_dtype=reply_dtype))
        for _ in range(2):
            result = await transport.execute(replace(gpu_call(shard, tokens, dtype=dtype), reply_dtype=reply_dtype))
            assert result.partials.device == GPU
            assert result.receipt == expected.receipt
            assert torch.equal(result.partials.cpu(), expected.partials)
    assert GPU in transport.shared_devices
    await asyncio.gather(transport.close(), grpc.close())


async def test_a_coordinator_keeps_tensors_on_the_gpu_and_gives_the_bits_of_host_memory(cluster: LocalCluster) -> None:
    async with Coordinator(cluster.addresses) as moe:
        for tokens in (1, 100, 1500):
            hidden = torch.randn(tokens, 1024).bfloat16()
            ids = torch.rand(tokens, 8).argsort(dim=1)[:, :4]
            # Some tokens have no experts at all, so that rows are gathered and spread.
            ids[torch.rand(tokens) < 0.2] = -1
            weights = torch.rand(tokens, 4)
            expected = await moe(1, hidden, topk_ids=ids, topk_weights=weights)
            output = await moe(1, hidden.to(GPU), topk_ids=ids.to(GPU), topk_weights=weights.to(GPU))
            assert output.device == GPU
            assert torch.equal(output.cpu(), expected)
        assert moe.sharing_gpu_memory == {*cluster.addresses}


async def test_a_synchronous_coordinator_works_for_any_stream(cluster: LocalCluster) -> None:
    hidden, ids, weights = torch.randn(64, 1024, device=GPU), torch.arange(4).expand(64, 4), torch.ones(64, 4)

    def call_on_another_stream() -> None:
        with SyncCoordinator(cluster.addresses) as moe:
            expected = moe(1, hidden, topk_ids=ids, topk_weights=weights)
            with torch.cuda.stream(torch.cuda.Stream(GPU)):
                for _ in range(20):
                    torch.cuda._sleep(2_000_000)
                    late = hidden.clone()
                    copy = moe(1, late, topk_ids=ids, topk_weights=weights).clone()
                    assert torch.equal(copy, expected)

    await asyncio.to_thread(call_on_another_stream)


async def test_batches_of_callers_on_the_gpu_and_elsewhere_are_merged(cluster: LocalCluster) -> None:
    transport, shard = await connected(cluster.addresses[0])
    sizes = (1, 3, 64, 7, 300, 2, 513, 30)
    calls = [
        (gpu_call if index % 2 else host_call)(shard, tokens, request_id=index)
        for index, tokens in enumerate(sizes * 4, 1)
    ]
    alone = {tokens: (await transport.execute(host_call(shard, tokens))).partials.clone() for tokens in sizes}
    for _ in range(5):
        for call, result in zip(calls, await asyncio.gather(*map(transport.execute, calls)), strict=True):
            assert result.partials.device == call.hidden.device
            assert torch.equal(result.partials.cpu(), alone[len(call.hidden)])
    await transport.close()


async def test_work_of_the_callers_stream_comes_first_and_results_outlive_their_views(cluster: LocalCluster) -> None:
    transport, shard = await connected(cluster.addresses[0])
    wanted = gpu_call(shard, 64)
    expected = (await transport.execute(wanted)).partials.clone()
    blank = torch.zeros_like(wanted.hidden.view(torch.uint8))
    copies = []
    with torch.cuda.stream(torch.cuda.Stream(GPU)):
        for request_id in range(1, 50):
            late = blank.clone()
            torch.cuda._sleep(2_000_000)  # about a millisecond, in which the hidden states are still zeros
            late.copy_(wanted.hidden.view(torch.uint8))
            call = replace(wanted, request_id=request_id, hidden=late.view(wanted.hidden.dtype))
            partials = (await transport.execute(call)).partials
            torch.cuda._sleep(2_000_000)
            copies.append(partials.clone())
            del partials
    torch.cuda.synchronize()
    assert all(torch.equal(copy, expected) for copy in copies)
    await transport.close()


async def test_offsets_outside_the_memory_are_refused_and_the_connection_goes_on(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    transport, shard = await connected(cluster.addresses[0])
    await transport.execute(gpu_call(shard, 8))
    for offset, complaint in (
        (16 << 20, "GPU memory has 16777216"),
        (2**64 - 256, "the call's tensors end"),
        (8, "a multiple"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Slot, "gpu_offset", offset)
            with pytest.raises(InvalidBatch, match=complaint):
                await transport.execute(gpu_call(shard, 8))
    assert (await transport.execute(gpu_call(shard, 8))).partials.isfinite().all()
    await transport.close()


async def test_a_transport_that_is_closed_gives_its_memory_back(cluster: LocalCluster) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info(GPU)[0]
    transport, shard = await connected(cluster.addresses[0])
    for _ in range(2):
        await transport.execute(gpu_call(shard, 4000))
    assert torch.cuda.mem_get_info(GPU)[0] <= free - (16 << 20)
    await transport.close()
    torch.cuda.empty_cache()
    async with asyncio.timeout(20):
        while torch.cuda.mem_get_info(GPU)[0] < free:
            await asyncio.sleep(0.05)


async def test_what_is_no_memory_of_this_gpu_or_less_than_was_said_is_refused(
    cluster: LocalCluster, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create = GpuMemory.create

    def boastful(size: int, device: torch.device) -> tuple[GpuMemory, int]:
        memory, descriptor = create(size, device)
        memory.size *= 2
        return memory, descriptor

    def no_memory(size: int, device: torch.device) -> tuple[GpuMemory, int]:
        return create(size, device)[0], os.memfd_create("no-gpu-memory")

    caplog.set_level(logging.WARNING, "expertd.client")
    for made in (boastful, no_memory):
        caplog.clear()
        monkeypatch.setattr(GpuMemory, "create", made)
        transport, shard = await connected(cluster.addresses[0])
        result = await transport.execute(gpu_call(shard, 8))
        assert result.partials.device == GPU
        assert GPU not in transport.shared_devices
        assert "bytes of GPU memory cannot be mapped: cuMem" in caplog.text
        await transport.close()


async def test_a_killed_callers_memory_is_given_back_and_others_go_on(cluster: LocalCluster) -> None:
    transport, shard = await connected(cluster.addresses[0])
    right = (await transport.execute(gpu_call(shard, 64))).partials.clone()
    shared, free = shared_bytes(cluster), torch.cuda.mem_get_info(GPU)[0]
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", CLIENT, cluster.addresses[0]),
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path.cwd())])},
    )
    assert client.stdout is not None
    for _ in range(20):
        assert await client.stdout.readline() == b"answered\n"
    assert shared_bytes(cluster) > shared
    client.kill()
    await client.wait()
    async with asyncio.timeout(30):
        while shared_bytes(cluster) > shared or torch.cuda.mem_get_info(GPU)[0] < free - (8 << 20):
            await asyncio.sleep(0.05)
    assert torch.equal((await transport.execute(gpu_call(shard, 64))).partials, right)
    await transport.close()


async def test_a_server_without_a_gpu_is_reached_through_host_memory(
    cluster: LocalCluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "expertd.client")
    folder = write_demo_checkpoint(tmp_path, MODEL)
    async with LocalCluster(folder, ["0-7"], ["--backend", "torch"]) as other:
        transport, shard = await connected(other.addresses[0])
        result = await transport.execute(gpu_call(shard, 8))
        assert result.partials.device == GPU
        assert HOST in transport.shared_devices
        assert GPU not in transport.shared_devices
        assert "no memory of cuda:0 is shared, its tensors go through host memory: the server computes on no GPU" in (
            caplog.text
        )
        await transport.close()


async def test_memory_is_one_for_all_that_map_it_and_exists_as_long_as_any() -> None:
    made, descriptor = GpuMemory.create(5 << 20, GPU)
    assert made.size == 6 << 20
    mapped = GpuMemory.open(descriptor, made.size, GPU)
    with pytest.raises(GpuMemoryError, match="cuMemMap"):
        GpuMemory.open(descriptor, made.size + (2 << 20), GPU)
    os.close(descriptor)
    made.tensor(256, 4).copy_(torch.tensor([1, 2, 3, 4], dtype=torch.uint8))
    view = mapped.tensor(0, mapped.size)
    made.close()
    assert view[256:260].tolist() == [1, 2, 3, 4]
    free = torch.cuda.mem_get_info(GPU)[0]
    released: list[None] = []
    part = mapped.tensor(0, 1024, lambda: released.append(None))[100:]
    del view, mapped
    assert not released
    del part
    assert released
    assert torch.cuda.mem_get_info(GPU)[0] >= free + (6 << 20)


async def test_tensors_lie_in_the_memory_whatever_the_default_device() -> None:
    memory, descriptor = GpuMemory.create(1 << 20, GPU)
    os.close(descriptor)
    with torch.device("cpu"):
        view = memory.tensor(256, 4)
    assert (view.device, view.data_ptr()) == (GPU, memory.address + 256)
