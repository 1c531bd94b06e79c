"""Experts and weights of a server with several devices, changed while it serves."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertd.client.placement.admin import release_weights, share_calls, update_shard, update_weights
from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.model.spread import Held
from expertd.kernels.oracle.reference import relative_error
from expertd.proto.base.errors import InvalidBatch
from expertd.proto.codec import ShardInfo
from expertd.server.app import Server
from tests.support.families import SMALL
from tests.support.serving import ANY_PORT, call_for, random_batch, running_server

PLAIN = ClientSecurity()
OPTIONS = {"devices": (0, 2), "device_experts": 5, "admin_listen": ANY_PORT}
Chosen = Mapping[int, Sequence[int]]


async def update(server: Server, layer: int, experts: Sequence[int], chosen: Chosen) -> int:
    """The bytes that it read."""
    now = server.info
    updating = update_shard(now.admin_address, PLAIN, now.placement_epoch, {layer: experts}, {layer: chosen})
    return [told.read_bytes async for told in updating][-1]


async def told(server: Server) -> ShardInfo:
    transport = GrpcTransport(str(server.address))
    try:
        return await transport.get_shard(5.0)
    finally:
        await transport.close()


async def computed(server: Server) -> torch.Tensor:
    """Of layer 1, by experts 0 to 7."""
    transport = GrpcTransport(str(server.address))
    try:
        return (await transport.execute(call_for(server, random_batch(30, 256, 8, 4)))).partials.clone()
    finally:
        await transport.close()


def held(shard: ShardInfo, layer: int) -> Held:
    return tuple(device.experts[layer] for device in shard.devices)


async def test_who_asks_decides_which_device_has_what(small_model: Path) -> None:
    async with running_server(small_model, range(8)) as one:
        right = await computed(one)
    async with running_server(small_model, range(8), **OPTIONS) as server:
        expert = server.shard.config.expert_bytes
        shard = await told(server)
        assert [one.room for one in shard.devices] == [5, 5]
        assert [len(its) for its in held(shard, 1)] == [5, 5]
        for first, second, read in (
            ((0, 1, 2, 3), (4, 5, 6, 7), None),
            # Nothing changes but who has what: two are read, one of them for both.
            ((0, 1, 2, 3, 4), (0, 4, 5, 6, 7), 2 * expert),
            ((0, 1, 2, 3), (4, 5, 6, 7), 0),
            ((3,), (0, 1, 2, 4, 5), None),
        ):
            wanted = sorted({*first, *second})
            size = await update(server, 1, wanted, {0: first, 2: second})
            assert size == read or read is None
            shard = await told(server)
            assert held(shard, 1) == (first, second)
            assert shard.experts[1] == tuple(wanted)
            if len(wanted) == 8:
                assert relative_error(await computed(server), right) < 1e-6
        # What nobody decides: new ones come to who has most room.
        await update(server, 1, range(8), {})
        assert held(await told(server), 1) == ((3, 6, 7), (0, 1, 2, 4, 5))
        # All of a device's experts may go, and come again.
        await update(server, 1, (0, 1), {2: (0, 1)})
        assert held(await told(server), 1) == ((), (0, 1))
        await update(server, 1, range(8), {0: (3, 4, 5, 6, 7), 2: (0, 1, 2)})
        assert relative_error(await computed(server), right) < 1e-6


@pytest.mark.parametrize(
    ("chosen", "complaint"),
    [
        ({0: (0, 1, 2, 3), 1: (4, 5, 6, 7)}, "devices name 1, which computes nothing here"),
        ({0: (0, 1, 2, 3, 4, 5), 2: (6, 7)}, r"device 0 is to have \[0, 1, .*\]; they must ascend, 5 at most"),
        ({0: (1, 0, 2, 3), 2: (4, 5, 6, 7)}, r"device 0 is to have \[1, 0, 2, 3\]; they must ascend"),
        ({0: (0, 1, 2, 3), 2: (4, 5, 6)}, r"devices are to have other experts than \[0, 1, 2, 3, 4, 5, 6, 7\]"),
        ({0: (0, 1, 2, 3), 2: (4, 5, 6, 7, 8)}, "devices are to have other experts than"),
        ({0: (0, 1, 2, 3, 7), 2: (1, 4, 5, 6, 7)}, "layers name nothing that would change"),
    ],
)
async def test_what_devices_cannot_have_is_refused_by_name(small_model: Path, chosen: Chosen, complaint: str) -> None:
    async with running_server(small_model, range(8), **OPTIONS) as server:
        if complaint.startswith("layers"):
            await update(server, 1, range(8), chosen)
        before = server.info
        with pytest.raises(InvalidBatch, match=complaint):
            await update(server, 1, range(8), chosen)
        assert server.info == before


async def test_other_weights_are_where_the_former_ones_were(small_model: Path, tmp_path: Path) -> None:
    other = write_demo_checkpoint(tmp_path / "next", replace(SMALL, seed=SMALL.seed + 1))
    async with running_server(small_model, range(8), **OPTIONS) as server:
        chosen = {0: (0, 2, 4, 6), 2: (1, 3, 5, 6, 7)}
        await update(server, 1, range(8), chosen)
        former, admin = server.info.model_fingerprint, server.info.admin_address
        staging = update_weights(admin, PLAIN, server.info.placement_epoch, str(other))
        new = [told.done.next_model_fingerprint async for told in staging][-1]
        await share_calls(admin, PLAIN, server.info.placement_epoch, new, 1.0)
        await release_weights(admin, PLAIN, server.info.placement_epoch, former)
        assert server.info.model_fingerprint == new
        assert held(await told(server), 1) == tuple(chosen.values())
