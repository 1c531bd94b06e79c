"""Calls to a server on this machine through shared memory, and over gRPC wherever that cannot be."""

from __future__ import annotations

import torch

from expertd.client.transport.answer import answer
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.segment import Slot, layout_of
from expertd.client.transport.segment_pool import SegmentPool
from expertd.kernels.memory.gpu import stream_of
from expertd.proto.base.errors import Unavailable
from expertd.proto.codec import ExecuteCall, ExecuteResult, ShardInfo

CHUNK_BYTES = 64 << 20
HOST = torch.device("cpu")


class SharedMemoryTransport:
    """Segments shared with one server, for every device that calls come from, and a gRPC transport beside them."""

    def __init__(self, grpc: GrpcTransport, max_bytes: int, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Shares at most `max_bytes` of each device's memory; calls that find no room go over `grpc`."""
        self.address = grpc.address
        self._grpc = grpc
        self._max_bytes = max_bytes
        self._chunk_bytes = chunk_bytes
        self._pools = {HOST: SegmentPool(grpc, HOST, max_bytes)}

    @property
    def chunk_bytes(self) -> int:
        return self._chunk_bytes if self._pools[HOST].shared else self._grpc.chunk_bytes

    @property
    def shared_devices(self) -> frozenset[torch.device]:
        return frozenset(device for device, pool in self._pools.items() if pool.shared)

    async def get_shard(self, timeout: float) -> ShardInfo:
        shard = await self._grpc.get_shard(timeout)
        for pool in self._pools.values():
            pool.renew()
        await self._pools[HOST].begin()
        return shard

    async def execute(self, call: ExecuteCall) -> ExecuteResult:
        stream = stream_of(call.hidden)
        slot = await self._take(call, stream)
        if slot is None:
            return await self._grpc.execute(call)
        # The caller's GPU may be busy for long: that time is not the server's.
        await slot.write(call, stream)
        return await answer(self.address, call, slot.segment.exchange(call, slot), slot.partials)

    async def until_not_serving(self) -> Unavailable:
        return await self._grpc.until_not_serving()

    async def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
        await self._grpc.close()

    async def _take(self, call: ExecuteCall, stream: torch.cuda.Stream | None) -> Slot | None:
        """Room for a call, on its tensors' GPU if it can be had there."""
        if stream is not None:
            if stream.device not in self._pools:
                self._pools[stream.device] = pool = SegmentPool(self._grpc, stream.device, self._max_bytes)
                pool.renew()
            slot = await self._pools[stream.device].take(layout_of(call, on_gpu=True), stream)
            if slot is not None:
                return slot
        return await self._pools[HOST].take(layout_of(call, on_gpu=False), None)
