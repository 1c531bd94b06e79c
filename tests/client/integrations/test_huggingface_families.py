"""Families beside DeepSeek-V3: their models with experts on servers, their checkpoints and their routing."""

import copy
from collections.abc import AsyncIterator

import pytest
import torch
from transformers import AutoConfig, FineGrainedFP8Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from expertd.client.base.gate import load_gates
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.integrations.huggingface import NAME, register, unregister
from expertd.kernels.oracle.reference import relative_error
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.experts import load_layer
from expertd.proto.base.errors import ModelMismatch
from tests.support.families import CONFIGS, FamilyFolders
from tests.support.generation import (
    NEW_TOKENS,
    AutoModel,
    experts_of,
    generate,
    in_thread,
    load,
    logits,
    no_warnings,
    prompts,
    round_inputs,
)
from tests.support.serving import running_server

EXACT = CoordinatorConfig(hidden_dtype=torch.bfloat16, reply_dtype=torch.float32)


@pytest.fixture
async def servers(family: FamilyFolders) -> AsyncIterator[list[str]]:
    async with (
        running_server(family.quantized, range(8)) as low,
        running_server(family.quantized, range(8, 16)) as high,
    ):
        yield [str(low.address), str(high.address)]
        unregister()


async def test_tokens_and_logits_are_those_of_local_experts(
    servers: list[str], family: FamilyFolders, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare() -> None:
        local = load(family.floats, "eager", dtype=torch.float32)
        round_inputs(monkeypatch, local)
        with register(servers, EXACT):
            remote = load(family.floats, NAME, dtype=torch.float32)
            tokens = generate(local, prompts())
            assert tokens[:, 9:].unique().numel() > NEW_TOKENS // 2, "the comparison is not of one repeated token"
            assert torch.equal(generate(remote, prompts()), tokens)
            error = relative_error(logits(remote, tokens), logits(local, tokens))
            print(f"relative error of the logits {error:.1e}")
            # The last bits of FP32 decide how some hidden states are rounded to BF16.
            assert error < 1e-4
            others = prompts(4, seed=7)
            assert torch.equal(generate(remote, others), generate(local, others))

    await in_thread(compare)


async def test_expert_weights_are_neither_read_nor_kept(
    servers: list[str], family: FamilyFolders, caplog: pytest.LogCaptureFixture
) -> None:
    def check() -> None:
        with no_warnings(caplog), register(servers):
            model = load(family.plain, NAME)
            assert not [name for name, _ in model.named_parameters() if ".experts." in name]
            assert not any(parameter.is_meta for parameter in model.parameters())
            local = load(family.plain, "eager")
            assert all(
                sum(p.numel() for p in experts.parameters()) == 16 * 3 * 256 * 128 for experts in experts_of(local)
            )

    await in_thread(check)


async def test_fp8_linears_do_not_bring_the_expert_weights_back(servers: list[str], family: FamilyFolders) -> None:
    def check() -> None:
        config = AutoConfig.from_pretrained(family.plain)
        with register(servers), torch.device("meta"):
            model = AutoModel.from_config(config, experts_implementation=NAME)
            quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config(), pre_quantized=True)
            quantizer._process_model_before_weight_loading(model)
        names = [name for name, _ in model.named_parameters()]
        assert any("self_attn.q_proj.weight_scale_inv" in name for name in names)
        assert not any(".experts." in name for name in names)

    await in_thread(check)


async def test_the_coordinator_routes_as_the_model_does(servers: list[str], family: FamilyFolders) -> None:
    hidden = torch.randn(200, 256, generator=torch.Generator().manual_seed(3)).bfloat16()
    local = load(family.floats, "eager", dtype=torch.float32)
    with Checkpoint(family.quantized) as checkpoint:
        layers = checkpoint.config.moe_layers
        gates = load_gates(checkpoint, layers)
    config = CoordinatorConfig(gates=gates, hidden_dtype=torch.bfloat16, reply_dtype=torch.float32)
    async with Coordinator(servers, config) as moe:
        assert moe.layers == layers
        assert moe.model.moe_layers == layers
        for layer in layers:
            block = local.model.layers[layer].mlp
            with torch.inference_mode():
                expected = block(hidden.float().unsqueeze(0))[0]
                if hasattr(block, "shared_experts"):
                    expected = expected - block.shared_experts(hidden.float())
            # The output is BF16.
            assert relative_error(await moe(layer, hidden), expected) < 3e-3


def test_plain_weights_are_quantised_to_the_bits_of_fp8_checkpoints(family: FamilyFolders) -> None:
    with Checkpoint(family.plain) as plain, Checkpoint(family.quantized) as quantized:
        for layer in plain.config.moe_layers:
            ours, theirs = (load_layer(one, layer, (0, 7, 15), lambda _: None) for one in (plain, quantized))
            for name in ("up_gate", "up_gate_scales", "down", "down_scales"):
                assert torch.equal(getattr(ours, name).view(torch.uint8), getattr(theirs, name).view(torch.uint8)), name


async def test_a_model_of_another_family_is_refused(servers: list[str], family: FamilyFolders) -> None:
    served = AutoModel.from_pretrained(family.floats).config.model_type
    other = next(name for name in CONFIGS if name != served)

    def check() -> None:
        config, refused = CONFIGS[other], f"model_type is {other} in this model and {served} on"
        with register(servers):
            with pytest.raises(ModelMismatch, match=refused):
                AutoModel.from_config(copy.deepcopy(config), experts_implementation=NAME)
            local = AutoModel.from_config(copy.deepcopy(config), experts_implementation="eager")
            local.set_experts_implementation(NAME)
            with pytest.raises(ModelMismatch, match=refused):
                logits(local, prompts())

    await in_thread(check)
