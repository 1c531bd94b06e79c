"""Every family that servers know beside those of the other tests: transformers' model with experts here and there."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, DeepseekV3ForCausalLM, FineGrainedFP8Config
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.integrations.huggingface import NAME, register, unregister
from expertd.kernels.model.families import FAMILIES
from expertd.kernels.oracle.reference import relative_error
from tests.support.families import SERVED, FamilyFolders, auto_model, layers_of, publish, write_family
from tests.support.generation import (
    NEW_TOKENS,
    Model,
    generate,
    in_thread,
    logits,
    no_warnings,
    one_after_the_other,
    prompts,
    round_inputs,
    watch_calls,
)
from tests.support.serving import running_server

EXACT = CoordinatorConfig(hidden_dtype=torch.bfloat16, reply_dtype=torch.float32)
SHARED = set(SERVED) - {"mimo_v2_flash", "minimax_m2", "qwen3_vl_moe"}
UNLIKE = ("qwen3_next", "deepseek_v4")
"""Linear attention and gated shared experts; experts by token id and hyper-connections: these generate longer."""


@pytest.fixture(params=SERVED)
def folders(request: pytest.FixtureRequest, tmp_path: Path) -> FamilyFolders:
    return write_family(tmp_path, request.param)


@pytest.fixture
async def servers(folders: FamilyFolders) -> AsyncIterator[list[str]]:
    async with (
        running_server(folders.quantized, range(8)) as low,
        running_server(folders.quantized, range(8, 16)) as high,
    ):
        yield [str(low.address), str(high.address)]
        unregister()


def served(folders: FamilyFolders) -> str:
    return str(json.loads((folders.quantized / "config.json").read_text())["model_type"])


def load(folder: Path, experts: str, **options: Any) -> Model:  # noqa: ANN401
    auto = auto_model(AutoConfig.from_pretrained(folder))
    return auto.from_pretrained(folder, experts_implementation=experts, **options).eval()


def load_published(folders: FamilyFolders) -> Model:
    """The model of the servers' own files."""
    options: dict[str, Any] = {
        "experts_implementation": NAME,
        "quantization_config": FineGrainedFP8Config(dequantize=True),
        "dtype": torch.bfloat16,
    }
    auto: Any = auto_model(AutoConfig.from_pretrained(folders.plain))
    if served(folders) == "kimi_k2":
        # transformers knows no such model_type, and warns.
        auto = DeepseekV3ForCausalLM
    if served(folders) == "deepseek_ref":
        options["config"] = AutoConfig.from_pretrained(folders.plain)
    return auto.from_pretrained(folders.quantized, **options)


async def test_experts_are_on_the_servers_and_nothing_else_changes(
    servers: list[str], folders: FamilyFolders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def check() -> None:
        local = load(folders.floats, "eager", dtype=torch.float32)
        round_inputs(monkeypatch, local)
        with register(servers, EXACT):
            with no_warnings(caplog):
                remote = load(folders.floats, NAME, dtype=torch.float32)
            count = NEW_TOKENS if served(folders) in UNLIKE else 16
            tokens = generate(local, prompts(), count)
            assert tokens[:, 9:].unique().numel() > count // 2, "the comparison is not of one repeated token"
            assert torch.equal(generate(remote, prompts(), count), tokens)
            error = relative_error(logits_in_order(remote, tokens, served(folders) in SHARED), logits(local, tokens))
            print(f"relative error of the logits {error:.1e}")
            # The last bits of FP32 decide how some hidden states are rounded to BF16.
            assert error < 1e-4
            published = load_published(folders)
            for one in (remote, published):
                assert_equal_but_for_experts(one, local)
                overlapped = logits(one, tokens)
                with one_after_the_other(one):
                    assert torch.equal(logits(one, tokens), overlapped)
            assert_fp8_linears_have_no_experts(remote)
            if FAMILIES[served(folders)].fused:
                publish(folders.plain, served(folders))
                with no_warnings(caplog):
                    assert_equal_but_for_experts(load(folders.plain, NAME), local)

    await in_thread(check)


def logits_in_order(remote: Model, tokens: Tensor, shared: bool) -> Tensor:
    """The logits; each layer's shared experts must be computed while servers compute its routed ones."""
    blocks = [layer.mlp for layer in layers_of(remote) if hasattr(layer.mlp, "experts")]
    with pytest.MonkeyPatch.context() as patch:
        events = watch_calls(patch)
        for block in blocks if shared else ():
            one = getattr(block, "shared_experts", None) or block.shared_expert
            one.register_forward_hook(lambda *_: events.append("shared"))
        found = logits(remote, tokens)
        assert events == ["submitted", *["shared"] * shared, "collected"] * len(blocks)
    return found


def assert_equal_but_for_experts(remote: Model, local: Model) -> None:
    weights = {name: weight for name, weight in local.state_dict().items() if ".experts." not in name}
    assert len(weights) < len(local.state_dict())
    found = remote.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weight.to(found[name].dtype)) for name, weight in weights.items())


def assert_fp8_linears_have_no_experts(model: Model) -> None:
    with torch.device("meta"):
        empty = type(model)(model.config)
    FineGrainedFP8HfQuantizer(FineGrainedFP8Config(), pre_quantized=True)._process_model_before_weight_loading(empty)
    names = [name for name, _ in empty.named_parameters()]
    assert any(".self_attn." in name and name.endswith("weight_scale_inv") for name in names)
    assert not any(".experts." in name for name in names)
