"""Calls whose tensors are on the GPU of a server on the same machine."""

from dataclasses import replace

import torch

from expertd.client.tools.demo_checkpoint import DemoModel
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.shared_memory import SharedMemoryTransport
from expertd.proto.codec import ExecuteCall, ShardInfo
from tests.support.serving import call_for, random_batch

GPU = torch.device("cuda", 0)
MODEL = DemoModel(
    hidden_size=1024,
    moe_intermediate_size=512,
    n_routed_experts=8,
    num_experts_per_tok=4,
    n_group=1,
    topk_group=1,
    moe_layers=1,
)
OPTIONS = ["--backend", "cutile", "--batch-invariant"]


async def connected(address: str) -> tuple[SharedMemoryTransport, ShardInfo]:
    transport = SharedMemoryTransport(GrpcTransport(address), 1 << 30)
    return transport, await transport.get_shard(30.0)


def host_call(shard: ShardInfo, tokens: int, *, request_id: int = 1, dtype: torch.dtype | None = None) -> ExecuteCall:
    batch = random_batch(tokens, 1024, experts=8, top_k=4, seed=tokens)
    call = call_for(shard, batch, request_id=request_id)
    return call if dtype is None else replace(call, hidden=batch.hidden.float().to(dtype), scales=None)


def gpu_call(shard: ShardInfo, tokens: int, *, request_id: int = 1, dtype: torch.dtype | None = None) -> ExecuteCall:
    call = host_call(shard, tokens, request_id=request_id, dtype=dtype)
    scales = None if call.scales is None else call.scales.to(GPU)
    return replace(call, hidden=call.hidden.to(GPU), scales=scales)
