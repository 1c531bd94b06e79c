"""What a server owns, changed while it serves: all of it or nothing."""

import asyncio
import contextlib
import errno
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import torch

from expertd.client.coordinator import Coordinator
from expertd.client.placement.admin import update_shard
from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.numerics.backend import LayerWeights
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.torch.backend import TorchBackend
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import expert_tensors
from expertd.kernels.weights.record import RECORD
from expertd.proto.base.errors import (
    ExpertdError,
    InvalidBatch,
    Overloaded,
    ServerFault,
    StalePlacement,
    Unauthenticated,
    UnknownExpert,
)
from expertd.proto.codec.admin import ADMIN, DeviceExperts, LayerExperts, UpdateRequest
from expertd.server.admin.counting import OUTCOMES
from expertd.server.admin.service import AdminDoor
from expertd.server.admin.update import Updater
from expertd.server.app import Server
from expertd.server.options.config import InvalidOption
from tests.docs.fences import ROOT, Fence
from tests.support.coordinators import LAYER, QUICK, expected, routing, tokens
from tests.support.serving import ANY_PORT, call_for, door, random_batch, running_server, until

PLAIN = ClientSecurity()


def admin_of(server: Server) -> str:
    return str(door(server, AdminDoor).address)


async def update(
    server: Server, experts: Mapping[int, Sequence[int]], epoch: int | None = None, security: ClientSecurity = PLAIN
) -> int:
    """The new epoch."""
    current = server.info.placement_epoch if epoch is None else epoch
    heard = [response async for response in update_shard(admin_of(server), security, current, experts)]
    assert heard[-1].read_bytes == heard[-1].total_bytes
    assert [response.ready_layers for response in heard] == [*range(len(heard) - 1), len(heard) - 2]
    return heard[-1].done.placement_epoch


def held(server: Server) -> set[int]:
    """Keys of the layers that the backend holds."""
    assert isinstance(server.backend, TorchBackend)
    return set(server.backend._layers)


def serving(server: Server) -> set[int]:
    """Keys of the layers that requests use."""
    return {server.shard.key(layer) for layer in server.shard.layers}


async def test_experts_move_from_server_to_server_under_a_coordinator(small_model: Path) -> None:
    ids, weights = routing(20)
    call: dict[str, Any] = {"hidden": tokens(20), "topk_ids": ids, "topk_weights": weights}
    right = expected(small_model)
    async with (
        running_server(small_model, range(8), admin_listen=ANY_PORT) as low,
        running_server(small_model, range(8, 16), admin_listen=ANY_PORT) as high,
        Coordinator([str(low.address), str(high.address)], QUICK) as moe,
    ):
        assert relative_error(await moe(LAYER, **call), right) < 1e-5
        assert high.info.admin_address == admin_of(high)
        # Taken over before they are given up; the coordinator hears of neither but by its calls.
        assert await update(high, {LAYER: range(4, 16)}) == high.info.placement_epoch
        await update(low, {LAYER: (0, 1, 2, 3)})
        result = await moe.execute(LAYER, **call)
        assert relative_error(result.output, right) < 1e-5
        pairs = {report.address: report.pairs for report in result.servers}
        assert pairs == {str(low.address): int((ids < 4).sum()), str(high.address): int((ids >= 4).sum())}
        assert low.info.experts == {1: (0, 1, 2, 3), 2: tuple(range(8))}
        assert len(low.info.expert_digests) == 16 * (4 + 8)
        assert held(low) == serving(low)
        assert held(high) == serving(high)
        text = low.journal.loads.tables()["pairs"]
        assert [[count is None for count in row] for row in text] == [[False] * 4 + [True] * 4, [False] * 8]


async def test_a_layer_comes_and_goes(small_model: Path) -> None:
    batch = random_batch(5, 256, 4, 4)
    async with (
        running_server(small_model, range(4), admin_listen=ANY_PORT) as whole,
        running_server(small_model, range(4), layers=(2,), admin_listen=ANY_PORT) as part,
    ):
        first, second = GrpcTransport(str(whole.address)), GrpcTransport(str(part.address))
        right = (await first.execute(call_for(whole, batch, layer=1))).partials
        await update(part, {1: (0, 1, 2, 3), 2: ()})
        assert part.info.experts == {1: (0, 1, 2, 3)}
        assert torch.equal((await second.execute(call_for(part, batch, layer=1))).partials, right)
        with pytest.raises(UnknownExpert, match="layer is 2; this server owns layers 1"):
            await second.execute(call_for(part, batch, layer=2))
        assert held(part) == serving(part)
        # Nothing at all, and then what it never had.
        await update(part, {1: ()})
        assert part.info.experts == {}
        assert held(part) == set()
        await update(part, {2: (1, 2)})
        pair = random_batch(5, 256, 2, 2, absent=0.0)
        some = replace(call_for(whole, pair, layer=2), expert_ids=pair.expert_ids + 1)
        right = (await first.execute(some)).partials
        assert right.any()
        asked = replace(some, placement_epoch=part.info.placement_epoch)
        assert torch.equal((await second.execute(asked)).partials, right)
        await first.close()
        await second.close()


@pytest.mark.parametrize(
    ("experts", "epoch", "error", "complaint"),
    [
        ({1: (0,)}, 7, StalePlacement, "placement_epoch is 7; the current one is "),
        ({9: (0,)}, None, InvalidBatch, "layers holds 9; the model's MoE layers are 1-2"),
        ({1: (3, 2)}, None, InvalidBatch, r"experts of layer 1 are \[3, 2\]; they must ascend"),
        ({1: (15, 16)}, None, InvalidBatch, "experts of layer 1 hold 16; the model's are 0-15"),
        ({1: range(8)}, None, InvalidBatch, "layers name nothing that would change"),
        ({}, None, InvalidBatch, "layers name nothing that would change"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(
    small_model: Path, experts: dict[int, Sequence[int]], epoch: int | None, error: type[ExpertdError], complaint: str
) -> None:
    async with running_server(small_model, range(8), admin_listen=ANY_PORT) as server:
        with pytest.raises(error, match=complaint):
            await update(server, experts, epoch)


@pytest.mark.parametrize(
    ("layers", "complaint"),
    [
        ([(1, []), (1, [])], r"layers are \[1, 1\]; they must ascend"),
        ([(2, []), (1, [])], r"layers are \[2, 1\]; they must ascend"),
        ([(1, [0, 0])], r"devices of layer 1 are \[0, 0\]; each may be named once"),
    ],
)
async def test_what_is_named_twice_is_refused(
    small_model: Path, layers: list[tuple[int, list[int]]], complaint: str
) -> None:
    named = [
        LayerExperts(layer=layer, experts=[0], devices=[DeviceExperts(number=one, experts=[0]) for one in devices])
        for layer, devices in layers
    ]
    async with running_server(small_model, range(8), admin_listen=ANY_PORT) as server:
        before = server.info
        request = UpdateRequest(placement_epoch=before.placement_epoch, layers=named)
        async with grpc.aio.insecure_channel(admin_of(server)) as channel:
            method: Any = channel.unary_stream(f"/{ADMIN}/UpdateShard", UpdateRequest.SerializeToString)
            with pytest.raises(grpc.aio.AioRpcError, match=complaint) as refused:
                async for _ in method(request):
                    pass
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        assert server.info == before


class Slow(TorchBackend):
    """Makes its second new layer when it is told to, or fails to."""

    def __init__(self) -> None:
        super().__init__()
        self.go_on = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.fault: Exception | None = None
        self.spliced = 0

    def splice_layer(self, layer: int, base: int | None, kept: Mapping[int, int], added: LayerWeights) -> None:
        self.spliced += 1
        if self.spliced == 2:
            asyncio.run_coroutine_threadsafe(self.go_on.wait(), self.loop).result(20)
            if self.fault is not None:
                raise self.fault
        super().splice_layer(layer, base, kept, added)


@contextlib.asynccontextmanager
async def slow_server(model: Path) -> Any:  # noqa: ANN401
    backend = Slow()
    async with running_server(model, range(8), admin_listen=ANY_PORT, choose=lambda *_: (backend, "a test")) as server:
        try:
            yield server, backend
        finally:
            backend.go_on.set()


EVERY = tuple(range(16))
WANTED = {1: EVERY, 2: EVERY}


def told(server: Server, name: str, **labels: str) -> float:
    """What `/metrics` says of updates."""
    value = server.metrics.registry.get_sample_value(f"expertd_placement_{name}", labels)
    assert value is not None, name
    return value


def outcomes(server: Server) -> dict[str, float]:
    """Of updates, those that there were."""
    return {outcome: count for outcome in OUTCOMES if (count := told(server, "updates_total", outcome=outcome))}


async def test_updates_are_counted_with_what_they_read(small_model: Path) -> None:
    async with running_server(small_model, range(8), admin_listen=ANY_PORT) as server:
        assert outcomes(server) == {}
        epoch = told(server, "epoch")
        assert epoch == server.info.placement_epoch
        await update(server, {1: range(10)})
        # Two experts: the others were here. An expert is read once.
        read = told(server, "update_read_bytes_total")
        await update(server, {1: range(14)})
        assert told(server, "update_read_bytes_total") == 3 * read > 0
        with pytest.raises(StalePlacement):
            await update(server, {1: range(8)}, epoch=int(epoch))
        assert outcomes(server) == {"ok": 2, "aborted": 1}
        assert told(server, "epoch") == server.info.placement_epoch > epoch
        assert told(server, "update_seconds_count") == 2
        assert 0 < told(server, "update_seconds_sum") < 60
        assert told(server, "updates_in_flight") == 0
    async with running_server(small_model, range(8)) as server:
        with pytest.raises(AssertionError, match="updates_in_flight"):
            told(server, "updates_in_flight")


async def test_what_is_told_of_weights_follows_what_is_held(small_model: Path) -> None:
    def told_of_weights(server: Server) -> tuple[float | None, float | None]:
        told = server.metrics.registry.get_sample_value
        return told("expertd_weights_bytes"), told("expertd_layers_loaded")

    expert = 3 * (256 * 128 + 2 * 4)
    async with running_server(small_model, range(8), admin_listen=ANY_PORT) as server:
        assert told_of_weights(server) == (16 * expert, 2)
        await update(server, {1: range(10)})
        assert told_of_weights(server) == (18 * expert, 2)
        await update(server, {2: ()})
        assert told_of_weights(server) == (10 * expert, 1)
        await update(server, {1: range(4)})
        assert told_of_weights(server) == (4 * expert, 1)


async def test_one_at_a_time_and_who_leaves_leaves_it_as_it_was(small_model: Path) -> None:
    async with slow_server(small_model) as (server, backend):
        before = server.info
        updating = update_shard(admin_of(server), PLAIN, before.placement_epoch, WANTED)
        async for response in updating:
            if response.ready_layers == 1:
                break
        with pytest.raises(Overloaded, match="another update is running; wait for its end or cancel it"):
            await update(server, {1: (0,)})
        assert told(server, "updates_in_flight") == 1
        await updating.aclose()
        backend.go_on.set()
        async with asyncio.timeout(10):
            while held(server) != serving(server) or server.holdings.busy:
                await asyncio.sleep(0.01)
        assert server.info == before
        assert told(server, "updates_in_flight") == 0
        await update(server, WANTED)
        assert outcomes(server) == {"ok": 1, "cancelled": 1, "resource_exhausted": 1}
        assert server.info.experts == WANTED


async def test_who_does_not_hear_the_end_has_changed_it(small_model: Path) -> None:
    async with running_server(small_model, range(8), admin_listen=ANY_PORT) as server:
        updating = Updater(server.holdings).run(server.info.placement_epoch, WANTED, {})
        async for progress in updating:
            if progress.overlap is not None:
                break
        await updating.aclose()
        assert server.info.experts == WANTED
        assert outcomes(server) == {"ok": 1}


async def test_what_is_being_made_is_dropped_once_it_is_made(small_model: Path) -> None:
    async def change(server: Server) -> None:
        async for _ in Updater(server.holdings).run(server.info.placement_epoch, WANTED, {}):
            pass

    async with slow_server(small_model) as (server, backend):
        changing = asyncio.create_task(change(server))
        await until(lambda: backend.spliced == 2)
        changing.cancel()
        await asyncio.sleep(0.05)
        assert server.holdings.busy
        backend.go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await changing
        assert held(server) == serving(server)
        assert not server.holdings.busy


@pytest.mark.parametrize("fault", [RuntimeError("no memory"), None], ids=["backend", "checkpoint"])
async def test_what_fails_half_way_changes_nothing(small_model: Path, tmp_path: Path, fault: Exception | None) -> None:
    folder = shutil.copytree(small_model, tmp_path / "model", ignore=shutil.ignore_patterns(RECORD))
    async with slow_server(folder) as (server, backend):
        before = server.info
        backend.go_on.set()
        if fault is None:
            with Checkpoint(folder) as checkpoint:
                stored = expert_tensors(checkpoint, 2, 13)[0]
            with stored.file.open("r+b") as file:
                file.seek(stored.start)
                file.write(bytes(stored.num_bytes))
        backend.fault = fault
        with pytest.raises(ServerFault, match="no memory" if fault else "nothing was changed: .* nothing but zeros"):
            await update(server, WANTED)
        assert server.info == before
        assert held(server) == serving(server)
        assert outcomes(server) == {"internal": 1}
        assert told(server, "update_seconds_count") == 0


async def test_a_file_that_cannot_be_read_is_named_and_changes_nothing(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    async with running_server(small_model, range(8), admin_listen=ANY_PORT) as server:
        before = server.info
        with monkeypatch.context() as patched:
            patched.setattr(os, "preadv", fail)
            with pytest.raises(ServerFault, match=r"nothing was changed: /.*\.safetensors: .* Input/output error"):
                await update(server, WANTED)
        assert server.info == before
        assert held(server) == serving(server)
        assert outcomes(server) == {"internal": 1}
        await update(server, WANTED)


class OnDevice(TorchBackend):
    """Like one with memory of its own."""

    usable = 2 << 20

    def count_usable(self) -> int:  # type: ignore[override]
        return self.usable


async def test_new_layers_have_what_tensors_can_have(small_model: Path) -> None:
    backend = OnDevice()
    async with running_server(
        small_model, range(8), admin_listen=ANY_PORT, choose=lambda *_: (backend, "a test")
    ) as server:
        before = server.info
        with pytest.raises(Overloaded, match=r"2 new layers take .* and 2097152 are free"):
            await update(server, WANTED)
        assert server.info == before
        backend.usable = 5 << 20
        await update(server, WANTED)


async def test_who_may_and_who_did(small_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    file = tmp_path / "tokens"
    file.write_text("of-callers\n")
    own = tmp_path / "own"
    own.write_text("secret\n")
    options = {"admin_listen": ANY_PORT, "admin_token_file": own, "auth_token_file": file}
    async with running_server(small_model, range(8), **options) as server:
        for token, complaint in ((None, "authorization is missing"), ("of-callers", "holds no bearer token")):
            with pytest.raises(Unauthenticated, match=complaint):
                await update(server, {1: (0,)}, security=ClientSecurity(token=token))
        await update(server, {1: (0,)}, security=ClientSecurity(token="secret"))
        (line,) = (record.getMessage() for record in caplog.records if "audit" in record.getMessage())
    assert line.startswith("audit: UpdateShard by token ")
    assert line.endswith("layer 1: 0")
    assert "secret" not in line
    # Callers of experts find no administration at their address.
    with pytest.raises(InvalidOption, match=r"--admin-token-file needs --admin-listen"):
        replace(server.config, admin_listen=None)
    with pytest.raises(InvalidOption, match=r"--admin-listen 0.0.0.0:1 would let everybody .* give --admin-token-file"):
        replace(
            server.config, admin_listen=replace(ANY_PORT, host="0.0.0.0", port=1), admin_token_file=None, insecure=True
        )
    with pytest.raises(InvalidOption, match=r"--admin-listen 0.0.0.0:1 would take plaintext"):
        replace(server.config, admin_listen=replace(ANY_PORT, host="0.0.0.0", port=1))


async def test_the_manual_moves_experts(small_model: Path) -> None:
    text = (ROOT / "docs/operations.md").read_text()
    (fence,) = (fence for fence in Fence.all_of(text) if fence.mark == "run by tests/server/admin/test_update.py")
    async with running_server(small_model, range(8), admin_listen=ANY_PORT) as server:
        code = fence.code.replace("node1:50051", str(server.address)).replace("node1:50052", admin_of(server))
        ran = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True)
        assert ran.stderr == ""
        assert ran.stdout.splitlines()[-1].startswith("1 of 1 layers")
        assert server.info.experts == {1: tuple(range(12)), 2: tuple(range(8))}
