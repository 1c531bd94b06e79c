"""Replicas that do not hold the same weights are told apart, and never mixed."""

import asyncio
import contextlib
import dataclasses
import logging
import re
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd.client.coordinator import Coordinator
from expertd.client.fleet.discovery import FileServers
from expertd.client.fleet.ownership import resolve_ownership
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import expert_tensors
from expertd.kernels.weights.manifest import Manifest
from expertd.proto.base.errors import ModelMismatch
from expertd.proto.codec import DIGEST_BYTES, ShardInfo
from expertd.server.app import Server
from tests.support.coordinators import EXACT, LAYER, oracle, routing, tokens
from tests.support.fleets import addresses
from tests.support.mutations import DAMAGED, MUTATIONS, Tensors, mutate_checkpoint, unsampled_place
from tests.support.serving import running_server

CONFIG = MoeConfig()


def shard(layers: Sequence[int], experts: Sequence[int], **changes: Any) -> ShardInfo:  # noqa: ANN401
    """Every expert's digest is made of its layer and number."""
    digests = b"".join(bytes([layer, expert]) * (DIGEST_BYTES // 2) for layer in layers for expert in experts)
    told = ShardInfo(
        *(
            "f00d",
            1,
            CONFIG.fields,
            dict.fromkeys(layers, tuple(experts)),
            1,
            1,
            1,
            1,
            "torch",
            "cpu",
            "",
            "",
            "",
        ),
        expert_digests=digests,
    )
    return dataclasses.replace(told, **changes)


def resolve(*shards: ShardInfo) -> None:
    resolve_ownership([(f"node{index}:1", one) for index, one in enumerate(shards)])


def refusal(*shards: ShardInfo) -> str:
    with pytest.raises(ModelMismatch) as refused:
        resolve(*shards)
    return str(refused.value)


def test_replicas_that_agree_overlap_as_they_like() -> None:
    resolve(shard((3, 4, 9), range(32)), shard((4, 60), range(16, 64)), shard((9,), (5, 200)))


def test_the_first_expert_that_differs_is_named_with_both_servers() -> None:
    right = shard((3, 4), (5, 6, 7))
    wrong = shard((4, 5), (6, 7, 8))
    changed = bytearray(wrong.expert_digests)
    changed[DIGEST_BYTES + 15] ^= 1
    told = refusal(shard((9,), (1,)), right, dataclasses.replace(wrong, expert_digests=bytes(changed)))
    assert told.startswith(
        "node2:1 and node1:1 hold different weights of layer 4, expert 7: digests"
        f" {'0407' * 7}0406 and {'0407' * 8}; they differ in 1 of the 6 experts of node2:1."
    )


def test_a_server_that_tells_no_digests_is_not_compared() -> None:
    resolve(shard((3,), (1, 2)), shard((3,), (1, 2), expert_digests=b""))


def test_digests_of_another_number_of_experts_are_refused() -> None:
    assert refusal(shard((3, 4), (1, 2, 3), expert_digests=bytes(16))) == (
        "node0:1 tells 16 bytes of digests for 6 experts"
    )


def test_servers_with_and_without_a_manifest_are_told_what_to_do() -> None:
    told = refusal(shard((3,), (1,)), shard((3,), (2,), model_fingerprint="beef", has_manifest=True))
    assert told == (
        "node1:1 holds model 'beef', but node0:1 holds 'f00d'; node1:1 was started with a manifest and node0:1 without:"
        " give all servers the same one, or none"
    )


def scaled(tensors: Tensors) -> None:
    for (_, name), tensor in tensors.items():
        if name.endswith("_scale_inv"):
            tensor *= 1.5


def flip_unsampled(folder: Path) -> None:
    """A bit of layer 1's damaged expert that the fingerprint does not see."""
    with Checkpoint(folder) as checkpoint:
        stored = expert_tensors(checkpoint, 1, DAMAGED)[0]
    with stored.file.open("r+b") as file:
        file.seek(stored.start + unsampled_place(stored))
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))


CHANGES: dict[str, Callable[[Path], None]] = {
    "two experts scaled by 1.5": lambda folder: mutate_checkpoint(folder, 1, scaled),
    "one bit that is not sampled": flip_unsampled,
    **{
        name: lambda folder, mutation=mutation: mutate_checkpoint(folder, 1, mutation)  # type: ignore[misc]
        for name, mutation in MUTATIONS.items()
    },
}


def variant(model: Path, folder: Path, change: Callable[[Path], None]) -> Path:
    copied = shutil.copytree(model, folder / "variant")
    change(copied)
    return copied


@contextlib.asynccontextmanager
async def two_servers(
    first: Path,
    second: Path,
    experts: tuple[range, range] = (range(16), range(16)),
    manifest: Path | None = None,
) -> AsyncIterator[list[Server]]:
    async with running_server(first, experts[0]) as one, running_server(second, experts[1], manifest=manifest) as other:
        yield [one, other]


async def connect(servers: Sequence[Server]) -> str:
    with pytest.raises(ModelMismatch) as refused:
        await Coordinator(addresses(servers), EXACT).connect()
    return str(refused.value)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
async def test_replicas_of_two_fine_tunes_are_refused(
    small_model: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    async with two_servers(small_model, variant(small_model, tmp_path, change)) as servers:
        right, wrong = addresses(servers)
        told = await connect(servers)
        if change is not flip_unsampled:
            assert re.match(rf"{wrong} holds model '[0-9a-f]{{64}}', but {right} holds '[0-9a-f]{{64}}'", told)
            return
        assert servers[0].info.model_fingerprint == servers[1].info.model_fingerprint
        assert told.startswith(f"{wrong} and {right} hold different weights of layer 1, expert {DAMAGED}: digests ")
        assert "they differ in 1 of the 32 experts" in told


async def test_shards_of_two_fine_tunes_are_refused(small_model: Path, tmp_path: Path) -> None:
    other = variant(small_model, tmp_path, CHANGES["two experts scaled by 1.5"])
    # The damaged experts belong to both: what differs is what the second server does not own.
    async with two_servers(small_model, other, (range(DAMAGED, 16), range(DAMAGED))) as servers:
        wrong = addresses(servers)[1]
        assert (await connect(servers)).startswith(f"{wrong} holds model ")


async def test_servers_of_one_manifest_are_mixed_and_others_are_not(small_model: Path, tmp_path: Path) -> None:
    with Checkpoint(small_model) as checkpoint:
        manifest = Manifest.of(checkpoint, lambda _: None)
    file = tmp_path / "manifest.json"
    file.write_text(manifest.text)
    async with two_servers(small_model, small_model, manifest=file) as servers:
        assert [server.info.has_manifest for server in servers] == [False, True]
        assert servers[1].info.model_fingerprint == manifest.fingerprint
        assert "was started with a manifest and" in await connect(servers)
        async with (
            running_server(small_model, range(8), manifest=file) as third,
            Coordinator(addresses([servers[1], third]), EXACT) as moe,
        ):
            await moe(LAYER, tokens(1), topk_ids=routing(1)[0], topk_weights=routing(1)[1])


async def test_a_replica_of_other_weights_does_not_join(
    small_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    file = tmp_path / "servers"
    hidden, (ids, weights) = tokens(9), routing(9)
    expected = oracle(small_model, hidden, ids, weights)
    async with two_servers(small_model, variant(small_model, tmp_path, flip_unsampled)) as servers:
        right, wrong = addresses(servers)
        file.write_text(right)
        async with Coordinator(FileServers(file, seconds=0.05), EXACT) as moe:
            file.write_text(f"{right}\n{wrong}\n")
            async with asyncio.timeout(20):
                while "stays out of use" not in caplog.text:
                    await asyncio.sleep(0.05)
            # More than one probe, but one line.
            await asyncio.sleep(1.0)
            for _ in range(20):
                output = await moe(LAYER, hidden, topk_ids=ids, topk_weights=weights)
                assert relative_error(output, expected) < 1e-5
    assert servers[1].metrics.registry.get_sample_value("expertd_tokens_total") == 0
    (line,) = [record.message for record in caplog.records if "stays out of use" in record.message]
    assert line.startswith(f"{wrong} stays out of use: {wrong} and {right} hold different weights of layer 1, expert ")
    assert torch.is_tensor(output)
