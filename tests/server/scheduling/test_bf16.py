"""BF16 checkpoints: rounded to FP8 with a word, or served as they are."""

import dataclasses
import logging
from pathlib import Path

import pytest
import torch

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.tools import verify
from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics.quantize import FP8
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError
from expertd.kernels.weights.experts import load_layer, read_expert
from expertd.proto import codec
from expertd.proto.base.errors import ModelMismatch
from expertd.server.app import Server
from expertd.server.doctor.finding import Finding, ok
from expertd.server.doctor.host import check_memory
from expertd.server.options.config import WEIGHTS, InvalidOption, ServerConfig
from tests.support.serving import open_channel, running_server

MODEL = DemoModel(
    hidden_size=256, moe_intermediate_size=128, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("plain"), dataclasses.replace(MODEL, quantized=False))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_demo_checkpoint(tmp_path_factory.mktemp("quantized"), MODEL)


async def told_by(server: Server) -> codec.ShardInfo:
    async with open_channel(server) as channel:
        method = channel.unary_unary(
            f"/{codec.SERVICE}/GetShard", codec.ShardRequest.SerializeToString, codec.ShardResponse.FromString
        )
        return codec.decode_shard(await method(codec.ShardRequest()))


async def test_what_is_rounded_is_told_in_the_log_and_by_get_shard(
    plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "expertd"):
        async with running_server(plain, range(8)) as server:
            shard = await told_by(server)
    assert (shard.weight_dtype, shard.checkpoint_dtypes) == (FP8, (torch.bfloat16,))
    assert shard.weights == "fp8 of bf16"
    (record,) = [record for record in caplog.records if "BF16" in record.message]
    assert "rounded to FP8" in record.message
    assert "--weights bf16" in record.message


@pytest.mark.parametrize(
    ("fixture", "options", "weights"), [("plain", {"weights": "bf16"}, "bf16"), ("quantized", {}, "fp8")]
)
async def test_what_is_served_as_it_is_makes_no_words(
    fixture: str,
    options: dict[str, str],
    weights: str,
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "expertd"):
        async with running_server(request.getfixturevalue(fixture), range(8), **options) as server:
            shard = await told_by(server)
    assert shard.weights == weights
    assert shard.checkpoint_dtypes == (shard.weight_dtype,)
    assert not [record for record in caplog.records if "BF16" in record.message]


async def test_weights_are_loaded_bit_by_bit_and_verified_against_the_files(plain: Path) -> None:
    with Checkpoint(plain) as checkpoint:
        weights = load_layer(checkpoint, 1, (3, 5), lambda _: None, dtype=torch.bfloat16)
        for local, expert in enumerate((3, 5)):
            matrices = read_expert(checkpoint, 1, expert, torch.bfloat16)
            assert torch.equal(weights.down[local].float(), matrices.down)
            assert torch.equal(weights.up_gate[local].float(), torch.cat([matrices.up, matrices.gate]))
    assert (weights.up_gate_scales == 1).all()
    assert (weights.down_scales == 1).all()
    async with running_server(plain, range(8), weights="bf16", shadow_check_rate=1.0) as server:
        scope = verify.Scope(None, None, 0, torch.float32)
        security = ClientSecurity()
        for model in (plain, None):
            (report,) = await verify._verify_all([str(server.address)], model, None, scope, security)
            assert report.passed


async def test_a_checkpoint_of_fp8_is_refused(quantized: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tensor model\.layers\.1\..* is FP8 already; --weights bf16 is for"):
        async with running_server(quantized, range(8), weights="bf16"):
            pass


def test_options_that_contradict_each_other_are_refused(plain: Path) -> None:
    with pytest.raises(InvalidOption, match=r"^--weights is 'fp16'; choose from fp8, bf16$"):
        ServerConfig(model=plain, experts=(0,), weights="fp16")  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match=r"^--pipeline fast computes with FP8 weights"):
        ServerConfig(model=plain, experts=(0,), weights="bf16", pipeline="fast")


async def test_replicas_of_other_weights_do_not_pass_for_each_other(plain: Path) -> None:
    async with (
        running_server(plain, range(8)) as rounded,
        running_server(plain, range(7, 8), weights="bf16") as exact,
    ):
        addresses = [str(rounded.address), str(exact.address)]
        with pytest.raises(ModelMismatch) as refusal:
            await Coordinator(addresses, CoordinatorConfig()).__aenter__()
    assert str(refusal.value) == (
        f"{addresses[1]} serves weights of layer 1, expert 7 as bf16, {addresses[0]} as fp8 of bf16: their answers"
        " differ; start both with the same --weights"
    )


async def test_servers_of_other_experts_may_have_other_weights(plain: Path) -> None:
    async with (
        running_server(plain, range(4)) as rounded,
        running_server(plain, range(4, 8), weights="bf16") as exact,
        Coordinator([str(rounded.address), str(exact.address)], CoordinatorConfig()) as moe,
    ):
        ids = torch.tensor([[1, 5]])
        assert (await moe(1, torch.randn(1, 256), topk_ids=ids, topk_weights=torch.ones(1, 2))).isfinite().all()


def test_the_doctor_counts_the_bytes_that_are_kept(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted: list[tuple[int, int]] = []

    def judge(check: str, wanted: str, needed: int, beside: int, free: int, relief: str) -> Finding:
        counted.append((needed, beside))
        return ok(check, wanted)

    monkeypatch.setattr("expertd.server.doctor.host._judge_memory", judge)
    model = MoeConfig.from_json(plain / "config.json")
    for weights in WEIGHTS:
        config = ServerConfig(model=plain, experts=(0, 1), weights=weights, backend="torch")
        list(check_memory(config, model, 1 << 40, None))
    rounded, exact = counted
    # FP32 on the CPU, whatever is read; two layers while loading.
    assert exact == (rounded[0], 2 * rounded[1])
