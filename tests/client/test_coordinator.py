"""The coordinator over real servers in this process."""

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd.client.base.gate import load_gates
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.sync import SyncCoordinator
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.kernels.numerics.quantize import quantize_activations
from expertd.kernels.numerics.routing import route, router_logits
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.proto import expert_shard_pb2 as pb
from expertd.proto.base.errors import (
    DeadlineExceeded,
    InvalidBatch,
    ModelMismatch,
    ServerFault,
    StalePlacement,
    Unavailable,
    UnknownExpert,
)
from tests.support.coordinators import EXACT, EXPERTS, HIDDEN, LAYER, TOP_K, oracle, routing, tokens
from tests.support.fleets import addresses, running_servers
from tests.support.serving import call_for, random_batch, running_server

QUARTERS = [range(first, first + 4) for first in range(0, EXPERTS, 4)]


async def test_four_servers_give_the_oracles_result(small_model: Path) -> None:
    hidden, (ids, weights) = tokens(33), routing(33)
    async with running_servers(small_model, QUARTERS) as servers, Coordinator(addresses(servers), EXACT) as moe:
        result = await moe.execute(LAYER, hidden, topk_ids=ids, topk_weights=weights)
        assert relative_error(result.output, oracle(small_model, hidden, ids, weights)) < 1e-5
        assert sum(server.pairs for server in result.servers) == 33 * TOP_K
        assert [server.address for server in result.servers] == addresses(servers)
        assert moe.layers == (1, 2)
        assert moe.backends == {"torch"}
        assert "connected" in repr(moe)


async def test_fp8_activations_and_bfloat16_are_the_default_and_within_the_bound(small_model: Path) -> None:
    hidden, (ids, weights) = tokens(64), routing(64)
    async with running_servers(small_model, QUARTERS) as servers, Coordinator(addresses(servers)) as moe:
        output = await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights)
    assert output.dtype == torch.bfloat16
    assert 1e-3 < relative_error(output, oracle(small_model, hidden, ids, weights)) < 4.5e-2
    # Against the same quantised input only the rounding of partial sums and output to BF16 is left.
    stored, scales = quantize_activations(hidden)
    exact = (stored.float().unflatten(1, (-1, 128)) * scales.unsqueeze(-1)).flatten(1)
    assert relative_error(output, oracle(small_model, exact, ids, weights)) < 4e-3


async def test_repeated_runs_and_split_batches_are_bit_equal(small_model: Path) -> None:
    hidden, (ids, weights) = tokens(100), routing(100)
    async with (
        running_servers(small_model, QUARTERS, max_tokens_per_request=7) as narrow,
        running_servers(small_model, QUARTERS) as wide,
        Coordinator(addresses(narrow), EXACT) as parts,
        Coordinator(addresses(wide), EXACT) as whole,
    ):
        first = await whole(LAYER, hidden, topk_ids=ids, topk_weights=weights)
        for moe in (whole, parts, parts):
            assert torch.equal(await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights), first)


async def test_four_servers_and_one_agree(small_model: Path) -> None:
    hidden, (ids, weights) = tokens(50), routing(50)
    async with (
        running_servers(small_model, [*QUARTERS, range(EXPERTS)]) as servers,
        Coordinator(addresses(servers[:4]), EXACT) as four,
        Coordinator(addresses(servers[4:]), EXACT) as one,
    ):
        outputs = [await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights) for moe in (four, one)]
    assert relative_error(*outputs) < 1e-5


async def test_any_leading_shape_and_absent_experts(small_model: Path) -> None:
    hidden, (ids, weights) = tokens(6).reshape(2, 3, HIDDEN), routing(6)
    ids[4] = -1
    async with running_servers(small_model, QUARTERS) as servers, Coordinator(addresses(servers), EXACT) as moe:
        output = await moe(LAYER, hidden, topk_ids=ids.reshape(2, 3, -1), topk_weights=weights.reshape(2, 3, -1))
        assert output.shape == (2, 3, HIDDEN)
        assert not output[1, 1].any()
        nothing = await moe.execute(LAYER, tokens(1), topk_ids=torch.tensor([[-1]]), topk_weights=torch.ones(1, 1))
        assert not nothing.output.any()
        assert nothing.servers == ()


async def test_gates_route_hidden_states_alone_and_logits(small_model: Path) -> None:
    hidden = tokens(20)
    with Checkpoint(small_model) as checkpoint:
        gates = load_gates(checkpoint, (LAYER,))
        config = checkpoint.config
    logits = router_logits(hidden, gates[LAYER].weight)
    ids, weights = route(logits, gates[LAYER].correction_bias, config)
    async with (
        running_servers(small_model, QUARTERS) as servers,
        Coordinator(addresses(servers), replace(EXACT, gates=gates)) as moe,
    ):
        given = await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights)
        assert torch.equal(await moe(LAYER, hidden), given)
        assert torch.equal(await moe(LAYER, hidden, logits), given)
        with pytest.raises(InvalidBatch, match="layer 2 has no gate"):
            await moe(2, hidden)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (
            {"hidden": torch.zeros(2, 255)},
            r"hidden is torch.float32 \[2, 255\]; it must be a float tensor \[..., 256\]",
        ),
        ({"hidden": torch.zeros(0, HIDDEN)}, r"hidden is torch.float32 \[0, 256\]"),
        ({"hidden": torch.zeros(2, HIDDEN, dtype=torch.int32)}, "hidden is torch.int32"),
        ({"topk_ids": torch.tensor([[0, 16], [1, 2]])}, "topk_ids must be integers from 0 to 15, or -1"),
        ({"topk_ids": torch.tensor([[0, -2], [1, 2]])}, "topk_ids must be integers from 0 to 15, or -1"),
        ({"topk_ids": torch.tensor([[0.0, 1.0], [1.0, 2.0]])}, "topk_ids must be integers"),
        (
            {"topk_ids": torch.tensor([[0, 1], [2, 2]])},
            r"topk_ids\[1\] is \[2, 2\]; a token may name an expert at most",
        ),
        ({"topk_ids": torch.tensor([[0, 1]])}, r"topk_ids is \[1, 2\]; it must have one row for each of 2 tokens"),
        ({"topk_ids": torch.zeros(2, 0, dtype=torch.int32)}, r"topk_ids is \[2, 0\]"),
        ({"topk_weights": torch.ones(2, 3)}, r"topk_ids is \[2, 2\], topk_weights \[2, 3\]; they must agree"),
        ({"topk_weights": torch.tensor([[1.0, torch.nan]] * 2)}, "topk_weights holds NaN or infinity"),
        ({"topk_weights": None}, "give topk_ids and topk_weights together"),
        ({"router_logits": torch.zeros(2, EXPERTS)}, "no router_logits with them"),
        (
            {"topk_ids": torch.arange(10).reshape(2, 5), "topk_weights": torch.ones(2, 5)},
            "topk_ids has 5 experts a token; the model's top-k is 4",
        ),
        ({"layer": 7}, r"layer 7 is on no server; layers served: \[1, 2\]"),
    ],
)
async def test_unusable_arguments_are_refused_before_anything_is_sent(
    small_model: Path, changes: dict[str, Any], complaint: str
) -> None:
    good: dict[str, Any] = {
        "layer": LAYER,
        "hidden": torch.zeros(2, HIDDEN),
        "topk_ids": torch.tensor([[0, 1], [2, 3]]),
        "topk_weights": torch.ones(2, 2),
    }
    async with running_server(small_model, range(EXPERTS)) as server, Coordinator([str(server.address)]) as moe:
        with pytest.raises((InvalidBatch, UnknownExpert), match=complaint):
            await moe(**(good | changes))
        assert server.metrics.registry.get_sample_value("expertd_batch_tokens_count") == 0


async def test_refuses_to_start_when_an_expert_has_no_owner_and_names_it(small_model: Path) -> None:
    async with running_servers(small_model, [range(7), range(8, 16)]) as servers:
        with pytest.raises(UnknownExpert, match="layer 1: no server owns expert 7; start servers with these --experts"):
            async with Coordinator(addresses(servers)):
                pass
        with pytest.raises(UnknownExpert, match="no server owns experts 7, 8, 9, 10, 11, 12, 13, 14 and 1 more"):
            async with Coordinator(addresses(servers[:1])):
                pass


async def test_experts_without_an_owner_are_named_beside_the_server_that_is_out_of_reach(small_model: Path) -> None:
    async with running_server(small_model, range(15)) as server:
        both = [str(server.address), "127.0.0.1:1"]
        with pytest.raises(UnknownExpert, match=r"layer 1: no server owns expert 15; .*; 127\.0\.0\.1:1: "):
            async with Coordinator(both, CoordinatorConfig(connect_timeout=0.5)):
                pass


async def test_overlapping_servers_count_each_pair_once(small_model: Path) -> None:
    hidden, (ids, weights) = tokens(20), routing(20)
    shards = [range(10), range(6, 16), range(EXPERTS)]
    async with running_servers(small_model, shards) as servers, Coordinator(addresses(servers), EXACT) as moe:
        output = await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights)
    assert relative_error(output, oracle(small_model, hidden, ids, weights)) < 1e-5


async def test_servers_of_different_models_are_refused(small_model: Path, tmp_path: Path) -> None:
    from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
    from tests.support.families import SMALL

    other = write_demo_checkpoint(tmp_path, replace(SMALL, seed=1))
    async with running_server(small_model, range(8)) as one, running_server(other, range(8, 16)) as two:
        with pytest.raises(ModelMismatch, match=f"{two.address} holds model '[0-9a-f]+', but {one.address} holds"):
            async with Coordinator(addresses([one, two])):
                pass


async def test_an_unreachable_server_is_named(small_model: Path) -> None:
    config = CoordinatorConfig(connect_timeout=0.5)
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1: "):
        async with Coordinator(["127.0.0.1:1"], config):
            pass


async def test_a_coordinator_waits_for_servers_that_are_still_starting(small_model: Path) -> None:
    async with running_server(small_model, range(EXPERTS)) as server:
        server.engine.close("the server is starting")
        opening = asyncio.create_task(Coordinator([str(server.address)]).__aenter__())
        await asyncio.sleep(0.3)
        assert not opening.done()
        server.engine.open()
        await (await opening).close()


async def test_a_stopped_server_is_an_error_that_names_it_and_the_next_call_reconnects(small_model: Path) -> None:
    hidden, (ids, weights) = tokens(5), routing(5)
    async with running_server(small_model, range(EXPERTS)) as server:
        address = server.address
        moe = await Coordinator([str(address)]).__aenter__()
        await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights)
    with pytest.raises(Unavailable, match=str(address)):
        await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights)
    await moe.close()


async def test_a_stream_that_ended_is_opened_again(small_model: Path) -> None:
    hidden, (ids, weights) = tokens(5), routing(5)
    async with running_server(small_model, range(EXPERTS)) as server, Coordinator([str(server.address)]) as moe:
        first = await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights)
        server.handlers.execution.stop_reading()
        await asyncio.sleep(0.1)
        assert torch.equal(await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights), first)


async def test_a_restarted_server_refuses_calls_planned_before(small_model: Path) -> None:
    hidden, (ids, weights) = tokens(5), routing(5)
    async with running_server(small_model, range(EXPERTS)) as server, Coordinator([str(server.address)]) as moe:
        anew = replace(server.shard, placement_epoch=server.shard.placement_epoch + 1)
        server.engine.placement = anew.placement(server.config.max_tokens_per_request)
        (transport,) = moe.transports
        planned = call_for(server, random_batch(5, HIDDEN, EXPERTS, TOP_K))
        stale = replace(planned, placement_epoch=anew.placement_epoch - 1)
        with pytest.raises(StalePlacement, match="placement_epoch is"):
            await transport.execute(stale)
        # A coordinator asks and plans again.
        result = await moe.execute(LAYER, hidden, topk_ids=ids, topk_weights=weights)
        assert result.effort.retries == 1


async def test_a_call_past_its_timeout_fails_and_the_stream_serves_on(small_model: Path) -> None:
    hidden, (ids, weights) = tokens(2000), routing(2000)
    async with running_server(small_model, range(EXPERTS)) as server:
        async with Coordinator([str(server.address)], CoordinatorConfig(call_timeout=0.001)) as moe:
            with pytest.raises(DeadlineExceeded, match=str(server.address)):
                await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights)
        async with Coordinator([str(server.address)]) as moe:
            await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights)


class AlteringTransport(GrpcTransport):
    """Alters what servers answer."""

    def alter(self, response: pb.ExecuteResponse) -> None:
        raise NotImplementedError

    async def exchange(self, request_id: int, message: bytes) -> bytes:
        response = pb.ExecuteResponse.FromString(await super().exchange(request_id, message))
        self.alter(response)
        return response.SerializeToString()


class LosingTransport(AlteringTransport):
    """Reports one pair less than was computed."""

    def alter(self, response: pb.ExecuteResponse) -> None:
        response.receipt_pairs[0] -= 1


class FlippingTransport(AlteringTransport):
    """Flips one bit of the partial sums."""

    def alter(self, response: pb.ExecuteResponse) -> None:
        partials = bytearray(response.partials)
        partials[17] ^= 4
        response.partials = bytes(partials)


@pytest.mark.parametrize(
    ("transport", "complaint"),
    [
        (LosingTransport, r"the receipt does not match the request: expert \d+: \d pairs sent"),
        (FlippingTransport, "its checksum does not match its partials"),
    ],
)
async def test_an_answer_that_is_not_what_was_computed_fails_the_call(
    small_model: Path, transport: type[AlteringTransport], complaint: str
) -> None:
    async with (
        running_server(small_model, range(EXPERTS)) as server,
        Coordinator([str(server.address)], open_transport=transport) as moe,
    ):
        ids, weights = routing(5)
        with pytest.raises(ServerFault, match=complaint):
            await moe(LAYER, tokens(5), topk_ids=ids, topk_weights=weights)


async def test_concurrent_calls_on_several_layers_do_not_mix(small_model: Path) -> None:
    async with running_servers(small_model, QUARTERS) as servers, Coordinator(addresses(servers), EXACT) as moe:
        cases = [(1 + n % 2, tokens(1 + n, seed=n), *routing(1 + n, seed=n)) for n in range(12)]
        calls = [moe(layer, hidden, topk_ids=ids, topk_weights=weights) for layer, hidden, ids, weights in cases]
        for output, (layer, hidden, ids, weights) in zip(await asyncio.gather(*calls), cases, strict=True):
            assert relative_error(output, oracle(small_model, hidden, ids, weights, layer)) < 1e-5


async def test_the_synchronous_twin_gives_the_same_bits(small_model: Path) -> None:
    hidden, (ids, weights) = tokens(10), routing(10)

    def call_synchronously(servers: list[str]) -> Tensor:
        with SyncCoordinator(servers, EXACT) as moe:
            assert moe.layers == (1, 2)
            assert moe.model.n_routed_experts == EXPERTS
            with pytest.raises(InvalidBatch, match="hidden is"):
                moe(LAYER, hidden[:, 1:], topk_ids=ids, topk_weights=weights)
            return moe(LAYER, hidden, topk_ids=ids, topk_weights=weights)

    async with running_servers(small_model, QUARTERS) as servers, Coordinator(addresses(servers), EXACT) as moe:
        expected = await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights)
        assert torch.equal(await asyncio.to_thread(call_synchronously, addresses(servers)), expected)


def test_the_synchronous_twin_cleans_up_when_it_cannot_connect() -> None:
    moe = SyncCoordinator(["127.0.0.1:1"], CoordinatorConfig(connect_timeout=0.3))
    with pytest.raises(Unavailable, match=r"127\.0\.0\.1:1"), moe:
        pass
    assert repr(moe) == "SyncCoordinator(['127.0.0.1:1'], not connected)"


async def test_a_coordinator_that_is_not_connected_says_how_to_connect() -> None:
    moe = Coordinator(["localhost:1"])
    with pytest.raises(RuntimeError, match="use it in 'async with"):
        await moe(LAYER, tokens(1))
    with pytest.raises(ValueError, match=r"servers is \[\]; give a list with at least one host:port"):
        Coordinator([])
    with pytest.raises(ValueError, match=r"reply_dtype is torch\.float16"):
        CoordinatorConfig(reply_dtype=torch.float16)
