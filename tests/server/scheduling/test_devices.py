"""A server with several devices: what each has, that their sums are one server's, and what becomes of a lost one."""

import asyncio
import contextlib
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.kernels.numerics.backend import TokenBatch
from expertd.kernels.oracle.reference import relative_error
from expertd.proto.base.errors import ExpertdError
from expertd.server.app import Server
from expertd.server.failpoints import VARIABLE
from expertd.server.options.config import InvalidOption, ServerConfig
from expertd.server.scheduling.watchdog import DeviceLost
from tests.support.serving import call_for, random_batch, running_server, until

EXPERTS = range(16)
FOUR = (0, 1, 2, 3)


def batch(tokens: int = 40, seed: int = 0) -> TokenBatch:
    return random_batch(tokens, 256, 16, 4, seed=seed)


async def computed(server: Server, asked: TokenBatch, dtype: torch.dtype = torch.float32) -> Tensor:
    transport = GrpcTransport(str(server.address))
    try:
        return (
            await transport.execute(call_for(server, asked, reply_dtype=dtype, placement_epoch=None))
        ).partials.clone()
    finally:
        await transport.close()


async def alone(model: Path, asked: TokenBatch, experts: range = EXPERTS, dtype: torch.dtype = torch.float32) -> Tensor:
    async with running_server(model, experts) as server:
        return await computed(server, asked, dtype)


def only(asked: TokenBatch, experts: range) -> TokenBatch:
    """The same with the pairs of some experts alone."""
    ids = asked.expert_ids
    return replace(asked, expert_ids=ids.masked_fill((ids < experts.start) | (ids >= experts.stop), -1))


def value(server: Server, name: str, **labels: str) -> float | None:
    return server.metrics.registry.get_sample_value(f"expertd_device_{name}", labels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_sums_are_added_in_the_order_of_devices_and_rounded_once(small_model: Path, dtype: torch.dtype) -> None:
    asked = batch(300)
    async with running_server(small_model, EXPERTS, devices=FOUR) as server:
        assert server.node.held[1] == ((0, 1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11), (12, 13, 14, 15))
        got = await computed(server, asked, dtype)
        assert all(record[0] > 0 for record in server.node.executor.records())  # type: ignore[union-attr]
    async with running_server(small_model, EXPERTS) as one:
        parts = [await computed(one, only(asked, range(first, first + 4))) for first in range(0, 16, 4)]
        plain = await computed(one, asked)
    expected = torch.zeros_like(plain)
    for part in parts:
        expected += part
    assert torch.equal(got, expected.to(dtype))
    assert relative_error(got.float(), plain) < (1e-6 if dtype == torch.float32 else 4e-3)


async def test_bits_do_not_depend_on_the_batch_even_where_experts_have_copies(small_model: Path) -> None:
    asked = batch(64)
    async with running_server(small_model, EXPERTS, devices=(0, 1), device_experts=13) as server:
        together = await computed(server, asked)
        for row in (0, 17, 63):
            scales = None if asked.scales is None else asked.scales[row : row + 1]
            single = TokenBatch(
                asked.hidden[row : row + 1], scales, asked.expert_ids[row : row + 1], asked.weights[row : row + 1]
            )
            assert torch.equal((await computed(server, single))[0], together[row])
        shared = set(server.node.held[1][0]) & set(server.node.held[1][1])
        assert len(shared) == 10


async def test_hot_experts_have_copies_by_recorded_loads(small_model: Path, tmp_path: Path) -> None:
    loads = tmp_path / "loads.json"
    loads.write_text('{"1": [9, 1, 1, 1, 1, 1, 1, 8, 1, 1, 1, 1, 1, 1, 1, 1]}')
    options: dict[str, Any] = {"devices": (0, 1), "device_experts": 9, "device_loads": loads}
    async with running_server(small_model, EXPERTS, **options) as server:
        first, second = server.node.held[1]
        assert set(first) & set(second) == {0, 7}
        assert torch.equal(
            (await computed(server, only(batch(), range(1)))), await alone(small_model, only(batch(), range(1)))
        )


async def test_getshard_tells_the_devices(small_model: Path) -> None:
    async with running_server(small_model, EXPERTS, devices=(0, 2)) as server:
        transport = GrpcTransport(str(server.address))
        shard = await transport.get_shard(5.0)
        await transport.close()
        assert [(one.number, one.lost) for one in shard.devices] == [(0, False), (2, False)]
        assert shard.device.startswith("2 x cpu")


async def test_a_lost_devices_experts_are_computed_by_those_that_have_copies(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    expected = await alone(small_model, batch())
    monkeypatch.setenv(VARIABLE, "lost_device=0.2,seed=4")
    async with running_server(small_model, EXPERTS, devices=(0, 1), device_experts=16) as server:
        epoch = server.info.placement_epoch
        for _ in range(60):
            assert relative_error(await computed(server, batch()), expected) < 1e-6
            if len(server.node.sound) == 1:
                break
        await until(lambda: len(server.node.sound) == 1)
        assert server.engine.closed_because is None
        assert server.info.placement_epoch > epoch
        assert server.info.experts == {1: tuple(EXPERTS), 2: tuple(EXPERTS)}
        (lost,) = [device for device in server.node.devices if device.lost is not None]
        assert lost.lost == "RuntimeError: failpoint lost_device"
        assert [one.lost for one in server.info.devices] == [device is lost for device in server.node.devices]
        assert value(server, "lost", device=str(lost.number)) == 1
        assert (value(server, "failed_batches_total", device=str(lost.number)) or 0) >= 1
        assert relative_error(await computed(server, batch()), expected) < 1e-6
    assert f"device {lost.number} is lost" in caplog.text


async def test_what_a_lost_device_alone_had_is_not_owned_any_more(
    small_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "lost_device=0.3,seed=1")
    async with running_server(small_model, EXPERTS, devices=(0, 1)) as server:
        for number in range(60):
            with contextlib.suppress(ExpertdError):  # of the call that the device failed
                await computed(server, batch(seed=number))
            if len(server.node.sound) == 1:
                break
            await asyncio.sleep(0.01)
        (kept,) = (place for place, device in enumerate(server.node.devices) if device.lost is None)
        left = tuple(range(8 * kept, 8 * kept + 8))
        assert server.info.experts == {1: left, 2: left}
        asked = only(batch(), range(left[0], left[-1] + 1))
        assert torch.equal(await computed(server, asked), await alone(small_model, asked))


async def test_a_device_that_hangs_is_left_and_the_others_serve_on(small_model: Path) -> None:
    async with running_server(small_model, EXPERTS, devices=(0, 1), device_timeout=1.0) as server:
        stuck = server.node.devices[1]
        submit, released = stuck.owner.submit, asyncio.Event()

        def hang(*_: Any) -> Any:  # noqa: ANN401
            asyncio.run_coroutine_threadsafe(released.wait(), loop).result()
            raise RuntimeError("too late")

        loop = asyncio.get_running_loop()
        stuck.owner.submit = hang
        with pytest.raises(ExpertdError, match="device 1 is lost; use another replica"):
            await computed(server, batch())
        assert stuck.lost == "it has not answered for 1 s"
        asked = only(batch(), range(8))
        assert torch.equal(await computed(server, asked), await alone(small_model, asked, EXPERTS))
        released.set()
        await asyncio.sleep(0.1)
        assert torch.equal(await computed(server, asked), await alone(small_model, asked, EXPERTS))
        stuck.owner.submit = submit


async def test_without_a_sound_device_the_server_ends(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "device_error=1")

    async def serve() -> None:
        async with running_server(small_model, EXPERTS, devices=(0, 1)) as server:
            with contextlib.suppress(ExpertdError):
                await computed(server, batch())
            await until(lambda: bool(server.engine.closed_because))

    with pytest.raises(DeviceLost, match="the device is lost: RuntimeError: failpoint device_error"):
        await serve()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"device_experts": 2}, "--device-experts needs --devices with it"),
        ({"device_loads": Path("x")}, "--device-loads needs --devices with it"),
        ({"devices": (0, 1), "device_experts": 17}, "--device-experts is 17; it must be from 1 to the 16"),
        ({"devices": tuple(range(65))}, "--devices names 65 devices; a server has at most 64"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidOption, match=text):
        ServerConfig(model=Path("m"), experts=tuple(EXPERTS), **options)


async def test_too_little_room_and_nothing_to_count_are_refused(small_model: Path) -> None:
    with pytest.raises(InvalidOption, match="--devices all: there is no GPU to count"):
        async with running_server(small_model, EXPERTS, devices=()):
            pass
    with pytest.raises(InvalidOption, match="--device-experts 3: 2 devices have room for 6 of 16 experts"):
        async with running_server(small_model, EXPERTS, devices=(0, 1), device_experts=3):
            pass
