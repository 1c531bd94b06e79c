"""The weights of a server, changed while it serves: a next generation beside those that serve, and one that goes."""

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from expertd.client.placement.admin import release_weights, share_calls, update_shard, update_weights
from expertd.client.tools.demo_checkpoint import write_demo_checkpoint
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.numerics.backend import LayerWeights
from expertd.kernels.torch.backend import TorchBackend
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import expert_tensors
from expertd.proto.base.errors import ExpertdError, InvalidBatch, ModelMismatch, ServerFault, StalePlacement
from expertd.proto.codec import UpdateProgress
from expertd.server.admin.service import AdminDoor
from expertd.server.app import Server
from tests.support.families import SMALL
from tests.support.serving import ANY_PORT, call_for, door, random_batch, running_server, shadow_checks, until

PLAIN = ClientSecurity()


@pytest.fixture(scope="module")
def next_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the small model's shape, with other weights."""
    return write_demo_checkpoint(tmp_path_factory.mktemp("next"), replace(SMALL, seed=SMALL.seed + 1))


def admin_of(server: Server) -> str:
    return str(door(server, AdminDoor).address)


async def stage(server: Server, folder: Path, fingerprint: str = "") -> str:
    """The fingerprint of the next generation."""
    epoch = server.info.placement_epoch
    told = [one async for one in update_weights(admin_of(server), PLAIN, epoch, str(folder), fingerprint)]
    assert [one.ready_layers for one in told] == [0, 1, 2, 2]
    assert told[-1].read_bytes == told[-1].total_bytes > 0
    assert told[-1].done.placement_epoch == server.info.placement_epoch > epoch
    return told[-1].done.next_model_fingerprint


async def share(server: Server, fingerprint: str, wanted: float) -> None:
    done = await share_calls(admin_of(server), PLAIN, server.info.placement_epoch, fingerprint, wanted)
    assert done.placement_epoch == server.info.placement_epoch


async def release(server: Server, fingerprint: str) -> None:
    await release_weights(admin_of(server), PLAIN, server.info.placement_epoch, fingerprint)


def held(server: Server) -> set[int]:
    """Keys of the layers that the backend holds."""
    assert isinstance(server.backend, TorchBackend)
    return set(server.backend._layers)


def told(server: Server, name: str, **labels: str) -> float | None:
    return server.metrics.registry.get_sample_value(f"expertd_generation_{name}", labels)


async def computed(server: Server, fingerprint: str, layer: int = 1) -> torch.Tensor:
    """By the generation with a fingerprint, as a coordinator would ask for it."""
    transport = GrpcTransport(str(server.address))
    try:
        shard = (await transport.get_shard(5.0)).of(fingerprint)
        assert shard is not None
        return (await transport.execute(call_for(shard, random_batch(5, 256, 8, 4), layer=layer))).partials.clone()
    finally:
        await transport.close()


async def test_a_next_generation_is_used_by_name_and_then_alone(small_model: Path, next_model: Path) -> None:
    async with (
        running_server(small_model, range(8), admin_listen=ANY_PORT, shadow_check_rate=1.0) as server,
        running_server(next_model, range(8)) as other,
    ):
        former, new = server.info.model_fingerprint, other.info.model_fingerprint
        old_sums, new_sums = await computed(server, former), await computed(other, new)
        assert not torch.allclose(old_sums, new_sums, rtol=0.1)
        assert await stage(server, next_model, new) == new
        transport = GrpcTransport(str(server.address))
        shard = await transport.get_shard(5.0)
        await transport.close()
        assert (shard.fingerprints, shard.next and shard.next.share) == ((former, new), 0.0)
        assert shard.next is not None
        assert shard.next.expert_digests == other.info.expert_digests != shard.expert_digests
        assert torch.equal(await computed(server, former), old_sums)
        assert torch.equal(await computed(server, new), new_sums)
        await share(server, new, 0.25)
        assert told(server, "share", model_fingerprint=former) == 0.75
        assert told(server, "share", model_fingerprint=new) == 0.25
        assert (told(server, "staged_bytes") or 0) > 0
        for fingerprint in (former, new):
            with pytest.raises(ModelMismatch, match=r"are for calls: the share of the next generation is 0\.25"):
                await release(server, fingerprint)
        await share(server, new, 1.0)
        assert torch.equal(await computed(server, former), old_sums)
        # Both are compared with files of their own.
        await until(lambda: shadow_checks(server, "ok") == 4)
        await release(server, former)
        assert (server.info.model_fingerprint, server.info.next) == (new, None)
        assert server.info.expert_digests == other.info.expert_digests
        assert torch.equal(await computed(server, new), new_sums)
        assert held(server) == server.holdings.generations.keys
        assert len(held(server)) == 2
        assert told(server, "staged_bytes") == 0
        await until(lambda: shadow_checks(server, "ok") == 5)
        assert shadow_checks(server, "mismatch") == 0


async def test_back_is_one_call_and_the_next_one_can_be_given_up(small_model: Path, next_model: Path) -> None:
    async with running_server(small_model, range(8), admin_listen=ANY_PORT) as server:
        before, keys = server.info, held(server)
        sums = await computed(server, before.model_fingerprint)
        new = await stage(server, next_model)
        await share(server, new, 1.0)
        await share(server, new, 0.0)
        await release(server, new)
        assert replace(server.info, placement_epoch=before.placement_epoch) == before
        assert held(server) == keys
        assert torch.equal(await computed(server, before.model_fingerprint), sums)


@pytest.mark.parametrize("generation", ["former", "next"])
async def test_a_server_verifies_each_generation_by_its_own_files(
    small_model: Path, next_model: Path, generation: str
) -> None:
    async with running_server(small_model, range(2), admin_listen=ANY_PORT) as server:
        new = await stage(server, next_model)
        fingerprint = new if generation == "next" else server.info.model_fingerprint
        reports = [one async for one in server.handlers._verifier.run((1,), (), 0, fingerprint)]
        assert all(one.relative_error < 1e-5 for one in reports)
        assert len(reports) == 3
        with pytest.raises(ModelMismatch, match="model_fingerprint is 'none'"):
            await anext(server.handlers._verifier.run((1,), (), 0, "none"))


async def test_what_cannot_be_is_refused_by_name(small_model: Path, next_model: Path, tmp_path: Path) -> None:
    other_shape = write_demo_checkpoint(tmp_path / "other", replace(SMALL, num_experts_per_tok=2))
    async with running_server(small_model, range(8), admin_listen=ANY_PORT) as server:
        before, keys = server.info, held(server)

        async def refused(kind: type[ExpertdError], complaint: str, folder: Path, fingerprint: str = "") -> None:
            with pytest.raises(kind, match=complaint):
                await stage(server, folder, fingerprint)

        await refused(InvalidBatch, "folder is '.*nowhere': .*nowhere", tmp_path / "nowhere")
        await refused(InvalidBatch, "num_experts_per_tok is 2; that of the model is 4", other_shape)
        await refused(InvalidBatch, "holds the weights that serve", small_model)
        await refused(ModelMismatch, "holds weights .*; model_fingerprint is 'wanted'", next_model, "wanted")
        with pytest.raises(ModelMismatch, match="model_fingerprint is 'x'; the next generation is none"):
            await share(server, "x", 1.0)
        with pytest.raises(ModelMismatch, match="one can be released beside another"):
            await release(server, before.model_fingerprint)
        with pytest.raises(StalePlacement):
            await share_calls(admin_of(server), PLAIN, 7, "x", 1.0)
        assert (server.info, held(server)) == (before, keys)
        new = await stage(server, next_model)
        await refused(ModelMismatch, "there is a next generation already", next_model)
        with pytest.raises(InvalidBatch, match=r"share is 1\.5; it must be from 0 to 1"):
            await share(server, new, 1.5)
        with pytest.raises(ModelMismatch, match="there are two generations of weights"):
            async for _ in update_shard(admin_of(server), PLAIN, server.info.placement_epoch, {1: (0,)}):
                pass


class Halting(TorchBackend):
    """Makes its second new layer when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.spliced = 0

    def splice_layer(self, layer: int, base: int | None, kept: Mapping[int, int], added: LayerWeights) -> None:
        self.spliced += 1
        if self.spliced == 2:
            asyncio.run_coroutine_threadsafe(self.go_on.wait(), self.loop).result(20)
        super().splice_layer(layer, base, kept, added)


@contextlib.asynccontextmanager
async def halting_server(model: Path) -> AsyncIterator[tuple[Server, Halting]]:
    backend = Halting()
    async with running_server(model, range(8), admin_listen=ANY_PORT, choose=lambda *_: (backend, "a test")) as server:
        try:
            yield server, backend
        finally:
            backend.go_on.set()


async def test_progress_is_told_and_who_leaves_leaves_it_as_it_was(small_model: Path, next_model: Path) -> None:
    async with halting_server(small_model) as (server, backend):
        before = server.info
        staging = update_weights(admin_of(server), PLAIN, before.placement_epoch, str(next_model))
        async for response in staging:
            if response.ready_layers == 1:
                break
        transport = GrpcTransport(str(server.address))
        now = await transport.get_shard(5.0)
        await transport.close()
        progress = UpdateProgress(response.read_bytes, response.total_bytes, 1, 2)
        assert now == replace(before, update=progress)
        await staging.aclose()
        backend.go_on.set()
        await until(lambda: held(server) == server.holdings.generations.keys and not server.holdings.busy)
        assert server.info == before


async def test_a_failed_check_leaves_the_weights_untouched(
    small_model: Path, next_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = shutil.copytree(next_model, tmp_path / "damaged")
    with Checkpoint(folder) as checkpoint:
        stored = expert_tensors(checkpoint, 2, 5)[0]
    with stored.file.open("r+b") as file:
        file.seek(stored.start)
        file.write(bytes(stored.num_bytes))
    async with running_server(small_model, range(8), admin_listen=ANY_PORT) as server:
        before, keys = server.info, held(server)
        sums = await computed(server, before.model_fingerprint)
        with pytest.raises(ServerFault, match=r"nothing was changed: .* nothing but zeros"):
            await stage(server, folder)
        assert (server.info, held(server)) == (before, keys)
        assert torch.equal(await computed(server, before.model_fingerprint), sums)
    lines = [record.getMessage() for record in caplog.records if "audit" in record.getMessage()]
    assert lines[0].startswith("audit: UpdateWeights by unproven from ipv4:127.0.0.1:")
    assert str(folder) in lines[0]
    assert "failed: nothing was changed" in lines[1]
