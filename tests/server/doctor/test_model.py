"""What `expertd doctor` tells of a checkpoint."""

import dataclasses
from pathlib import Path

import pytest

from expertd.kernels.model.config import MoeConfig
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.server.doctor.model import describe_model, gpus_needed
from tests.support.families import pack, write_family

DEEPSEEK_V3 = 58 * MoeConfig().expert_bytes
"""An expert of every layer: 2.55 GB."""


@pytest.mark.parametrize(
    ("memory", "gpus"),
    [
        (141_000_000_000, 5),  # 53 fit
        (80_000_000_000, 9),  # 29 fit
        (1_000_000_000_000, 4),  # 64 at most
        (5_000_000_000 + DEEPSEEK_V3, 256),
        (5_000_000_000 + DEEPSEEK_V3 - 1, 0),
        (1_000_000_000, 0),
    ],
)
def test_gpus_hold_whole_experts_beside_their_batches(memory: int, gpus: int) -> None:
    assert gpus_needed(256, DEEPSEEK_V3, memory) == gpus


def test_family_format_and_sizes_are_told(small_model: Path) -> None:
    with Checkpoint(small_model) as checkpoint:
        config = checkpoint.config
        told = describe_model(checkpoint, "fp8")
        size = config.expert_bytes / 1e6
        assert (told.level, told.check) == ("ok", "model")
        assert told.text.startswith(
            f"deepseek_v3, stored as FP8 blocks of {size:.2f} MB an expert; 16"
            f" experts in each of {len(config.moe_layers)} layers, served as fp8"
            f" with {size:.2f} MB each, "
        )
        assert told.text.endswith(" GB in all: 1 H100 (80 GB) or 1 H200 (141 GB)")
        assert f"served as bf16 with {2 * size:.2f} MB each" in describe_model(checkpoint, "bf16").text


def test_mxfp4_is_told_with_its_bytes(tmp_path: Path) -> None:
    folders = write_family(tmp_path, "deepseek_v4")
    pack(folders, "deepseek_v4")
    with Checkpoint(folders.quantized) as checkpoint:
        told = describe_model(checkpoint, "fp8").text
    assert told.startswith(
        "deepseek_v4, stored as MXFP4 of 0.05 MB an expert; 16 experts in each of 3 layers, served as fp8 with 0.10 MB"
    )


def test_what_kernels_do_not_take_is_told(small_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertd.server.doctor.model.MAX_INTERMEDIATE_SIZE", 64)
    with Checkpoint(small_model) as checkpoint:
        assert (
            "on CPUs only, because its moe_intermediate_size is 128 and kernels for GPUs take up to 64"
            in describe_model(checkpoint, "fp8").text
        )


def test_a_model_without_experts_fails(small_model: Path) -> None:
    with Checkpoint(small_model) as checkpoint:
        layers = checkpoint.config.num_hidden_layers
        checkpoint.config = dataclasses.replace(checkpoint.config, first_k_dense_replace=layers)
        assert describe_model(checkpoint, "fp8").level == "fail"
