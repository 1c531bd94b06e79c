"""Stream-ordered calls in what torch.compile compiles."""

import asyncio
from pathlib import Path

import pytest
import torch
from torch import Tensor

from expertd.client.stream.operator import on_stream
from expertd.client.sync import SyncCoordinator
from tests.support.coordinators import EXACT, EXPERTS, LAYER, routing, tokens
from tests.support.fence.markers import no_gpu
from tests.support.serving import running_server

pytestmark = no_gpu


async def test_a_compiled_step_has_the_calls_whole(small_model: Path) -> None:
    async with running_server(small_model, range(EXPERTS)) as server:
        hidden, (ids, weights) = tokens(3).float(), routing(3)

        def run() -> None:
            with SyncCoordinator([str(server.address)], EXACT) as moe:
                moe.prepare_stream(8, "cpu", timeout=5.0)

                def step(hidden: Tensor) -> Tensor:
                    return hidden + 2 * moe.on_stream(LAYER, hidden * 1.0, ids, weights)

                expected = step(hidden)
                # fullgraph: nothing of it breaks the graph.
                compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
                for _ in range(2):
                    assert torch.equal(compiled(hidden), expected)
                number = moe._coordinator.stream_calls.number
                torch.library.opcheck(on_stream, (number, LAYER, hidden, ids, weights))
                moe.check()
            with pytest.raises(RuntimeError, match="call prepare_stream first"):
                compiled(hidden)
            with pytest.raises(RuntimeError, match="compile again after prepare_stream"):
                on_stream(number, LAYER, hidden, ids, weights)

        await asyncio.to_thread(run)
