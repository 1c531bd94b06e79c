"""Experts that change on a GPU that serves."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertd.client.placement.admin import update_shard
from expertd.client.tools.cluster import LocalCluster
from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.oracle.reference import reference_partials, relative_error
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import load_layer
from tests.gpu.caller import connected, host_call
from tests.support.fence.markers import gpu_only

pytestmark = [gpu_only]

MODEL = DemoModel(
    hidden_size=1024,
    moe_intermediate_size=512,
    n_routed_experts=16,
    num_experts_per_tok=1,
    n_group=1,
    topk_group=1,
    moe_layers=2,
)


@pytest.mark.parametrize("pipeline", ["fast", "dequant"])
@pytest.mark.parametrize("emptied", [False, True])
async def test_a_layer_of_other_experts_is_served_from_the_next_request_on(
    tmp_path: Path, pipeline: str, *, emptied: bool
) -> None:
    folder = write_demo_checkpoint(tmp_path, MODEL)
    options = ["--backend", "cutile", "--pipeline", pipeline, "--admin-listen", "127.0.0.1:0"]
    async with LocalCluster(folder, ["0-7"], options) as cluster:
        transport, shard = await connected(cluster.addresses[0])
        changed = (2, 3, *range(8, 14))
        for wanted in ({1: (), 2: ()}, {2: changed}) if emptied else ({2: changed},):
            updates = update_shard(shard.admin_address, ClientSecurity(), shard.placement_epoch, wanted)
            assert [told.done async for told in updates][-1]
            shard = await transport.get_shard(10.0)
        assert shard.experts == ({2: changed} if emptied else {1: tuple(range(8)), 2: changed})
        call = host_call(shard, 40)
        ids = torch.tensor(changed)[torch.randint(8, (40, 1))].int()
        call = replace(call, layer=2, expert_ids=ids, weights=call.weights[:, :1].contiguous())
        result = await transport.execute(call)
        with Checkpoint(folder) as checkpoint:
            weights = load_layer(checkpoint, 2, changed, lambda read: None)
        local = torch.tensor([changed.index(expert) for expert in ids.flatten().tolist()], dtype=torch.int32).view(
            40, 1
        )
        batch = TokenBatch(call.hidden, call.scales, local, call.weights)
        assert relative_error(result.partials.float(), reference_partials(batch, weights)) < 4e-2
        await transport.close()
