"""What a server refuses to start with, and what it says of the weights that it holds."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd import cli
from expertd.kernels.numerics.backend import LayerWeights
from expertd.kernels.torch.backend import TorchBackend
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError
from expertd.kernels.weights.experts import expert_tensors, load_layer
from expertd.kernels.weights.manifest import MANIFEST, Manifest
from expertd.kernels.weights.record import RECORD
from expertd.proto import codec
from expertd.server.scheduling.selfcheck import SelfCheckFailed
from tests.support.mutations import DAMAGED, MUTATIONS, Tensors, mutate_checkpoint
from tests.support.serving import open_channel, running_server


@pytest.fixture
def folder(small_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(small_model, tmp_path / "model", ignore=shutil.ignore_patterns(RECORD))


async def start(folder: Path, **options: Any) -> None:  # noqa: ANN401
    async with running_server(folder, range(16), **options):
        pass


async def test_get_shard_tells_the_digests_of_what_was_loaded(folder: Path) -> None:
    with Checkpoint(folder) as checkpoint:
        manifest = Manifest.of(checkpoint, lambda _: None)
    (folder / MANIFEST).write_text(manifest.text)
    async with running_server(folder, range(4, 7)) as server, open_channel(server) as channel:
        method = channel.unary_unary(
            f"/{codec.SERVICE}/GetShard", codec.ShardRequest.SerializeToString, codec.ShardResponse.FromString
        )
        shard = codec.decode_shard(await method(codec.ShardRequest()))
    assert (shard.model_fingerprint, shard.has_manifest) == (manifest.fingerprint, True)
    assert shard.expert_digests.hex() == "".join(
        manifest.experts[layer][expert][:32] for layer in (1, 2) for expert in (4, 5, 6)
    )


async def test_a_flipped_bit_is_refused_by_the_manifest_with_layer_and_expert(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "released.json"
    assert cli.main(["fingerprint", str(folder), "--output", str(elsewhere)]) == 0
    await start(folder, manifest=elsewhere)
    with Checkpoint(folder) as checkpoint:
        stored = expert_tensors(checkpoint, 2, 13)[2]
    with stored.file.open("r+b") as file:
        file.seek(stored.start + 1234)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(
        CheckpointError, match=f"^layer 2, expert 13: the weights .*, but {re.escape(str(elsewhere))} says"
    ):
        await start(folder, manifest=elsewhere)


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
async def test_every_mutation_is_refused_by_the_manifest(folder: Path, mutation: Any) -> None:  # noqa: ANN401
    assert cli.main(["fingerprint", str(folder)]) == 0
    mutate_checkpoint(folder, 1, mutation)
    with pytest.raises(CheckpointError, match=f"^layer 1, expert {DAMAGED}: "):
        await start(folder)


async def test_an_expert_of_zeros_is_refused(folder: Path) -> None:
    def change(tensors: Tensors) -> None:
        for (expert, name), tensor in tensors.items():
            if expert == DAMAGED and name.endswith(".weight"):
                tensor.zero_()

    mutate_checkpoint(folder, 2, change)
    with pytest.raises(
        CheckpointError, match=rf"experts\.{DAMAGED}\.up_proj\.weight: expected weights, found nothing but"
    ):
        await start(folder)


@pytest.mark.parametrize("fault", ["zeros", "another layer", "gate and up swapped"])
async def test_the_self_check_sees_what_loading_did_wrong(small_model: Path, fault: str) -> None:
    class Spoiling(TorchBackend):
        def load_layer(self, layer: int, weights: LayerWeights) -> None:
            if fault == "another layer":
                with Checkpoint(small_model) as checkpoint:
                    weights = load_layer(checkpoint, 3 - layer, range(16), lambda _: None)
            elif fault == "zeros":
                weights.down.view(torch.uint8).zero_()
            elif fault == "gate and up swapped":
                for tensor in (weights.up_gate.view(torch.uint8), weights.up_gate_scales):
                    tensor.copy_(tensor.roll(tensor.shape[1] // 2, dims=1))
            super().load_layer(layer, weights)

    with pytest.raises(SelfCheckFailed, match="self-check of layer 1 on backend torch failed: relative error "):
        await start(small_model, choose=lambda *_: (Spoiling(), "a test"))
