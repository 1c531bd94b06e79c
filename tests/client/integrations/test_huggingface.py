"""DeepSeek-V3 models of transformers with their experts on servers in this process, against local experts."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel as AutoModelWithoutHead
from transformers import DeepseekV3Config, FineGrainedFP8Config, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Experts
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.integrations.huggingface import NAME, RemoteExperts, register, unregister
from expertd.kernels.numerics.quantize import dequantize_weights
from expertd.kernels.oracle.reference import relative_error
from expertd.proto.base.errors import ModelMismatch
from tests.support.generation import (
    NEW_TOKENS,
    AutoModel,
    Model,
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
# transformers annotates it too loosely to be checked.
Experts: Any = DeepseekV3Experts
Headless: Any = AutoModelWithoutHead


@pytest.fixture
async def servers(small_model: Path) -> AsyncIterator[list[str]]:
    async with running_server(small_model, range(8)) as low, running_server(small_model, range(8, 16)) as high:
        yield [str(low.address), str(high.address)]
        unregister()


@pytest.fixture(scope="module")
def float_model(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of `small_model` with the values that its FP8 weights stand for, in FP32."""
    folder = tmp_path_factory.mktemp("float")
    tensors: dict[str, Tensor] = {}
    for path in small_model.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        scales = {name: stored.pop(name) for name in list(stored) if name.endswith("_scale_inv")}
        for name, value in stored.items():
            scale = scales.get(f"{name}_scale_inv")
            tensors[name] = value.float() if scale is None else dequantize_weights(value, scale)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((small_model / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def load_fp8(folder: Path, experts: str) -> Model:
    """From FP8 blocks on disk. On the CPU transformers computes with the linears dequantised to BF16."""
    model = load(folder, experts, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.bfloat16)
    # FP32 arithmetic, so that what differs is the experts.
    return model.float()


async def test_tokens_and_logits_are_those_of_local_experts(
    servers: list[str], float_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare() -> None:
        local = load(float_model, "eager", dtype=torch.float32)
        with register(servers, EXACT):
            remote = load(float_model, NAME, dtype=torch.float32)
            tokens = generate(local, prompts())
            assert tokens[:, 9:].unique().numel() > NEW_TOKENS, "the comparison is not of one repeated token"
            assert torch.equal(generate(remote, prompts()), tokens)
            output = logits(remote, tokens)
            error = relative_error(output, logits(local, tokens))
            round_inputs(monkeypatch, local)
            rounded_error = relative_error(output, logits(local, tokens))
            print(f"relative error of the logits {error:.1e}, with BF16 inputs on both sides {rounded_error:.1e}")
            assert error < 5e-3
            assert rounded_error < 1e-5
            others = prompts(4, seed=7)
            assert torch.equal(generate(remote, others), generate(local, others))

    await in_thread(compare)


async def test_a_model_in_fp8_blocks_on_disk_gives_the_same_tokens(
    servers: list[str], small_model: Path, float_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare() -> None:
        local = load_fp8(small_model, "eager")
        # transformers rounds the dequantised weights to BF16, which the servers do not.
        exact = load(float_model, "eager", dtype=torch.float32)
        for rounded, unrounded in zip(experts_of(local), experts_of(exact), strict=True):
            rounded.load_state_dict(unrounded.state_dict())
        round_inputs(monkeypatch, local)
        with register(servers, EXACT):
            remote = load_fp8(small_model, NAME)
            tokens = generate(local, prompts())
            assert torch.equal(generate(remote, prompts()), tokens)
            error = relative_error(logits(remote, tokens), logits(local, tokens))
            print(f"relative error of the logits {error:.1e}")
            assert error < 1e-5

    await in_thread(compare)


async def test_fp8_activations_are_within_their_bound(servers: list[str], float_model: Path) -> None:
    def compare() -> None:
        local = load(float_model, "eager", dtype=torch.float32)
        with register(servers):
            local_logits = logits(local, prompts(3, 40))
            local.set_experts_implementation(NAME)
            error = relative_error(logits(local, prompts(3, 40)), local_logits)
        print(f"relative error of the logits, FP8 activations: {error:.1e}")
        # A token whose router is nearly undecided may choose another expert in the next layer.
        assert 1e-3 < error < 0.15

    await in_thread(compare)


async def test_expert_weights_are_neither_read_nor_kept(
    servers: list[str], small_model: Path, float_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def check() -> None:
        with no_warnings(caplog), register(servers):
            for model in (load(float_model, NAME), load_fp8(small_model, NAME), from_config(float_model)):
                assert not [name for name, _ in model.named_parameters() if ".experts." in name]
                assert not any(parameter.is_meta for parameter in model.parameters())
            # Registered servers leave other implementations alone.
            assert sum(p.numel() for p in experts_of(load(float_model, "eager"))[0].parameters()) == 16 * 3 * 256 * 128

    await in_thread(check)


async def test_a_model_without_a_head_has_no_expert_weights_either(servers: list[str], float_model: Path) -> None:
    def check() -> None:
        with register(servers), torch.inference_mode():
            models = [
                Headless.from_pretrained(float_model, experts_implementation=experts) for experts in (NAME, "eager")
            ]
            assert not [name for name, _ in models[0].named_parameters() if ".experts." in name]
            assert any(".experts." in name for name, _ in models[1].named_parameters())
            remote, local = (model(prompts()).last_hidden_state for model in models)
            # FP8 activations; a token whose router is nearly undecided may choose another expert.
            assert 1e-3 < relative_error(remote, local) < 0.15

    await in_thread(check)


def from_config(folder: Path) -> Model:
    return AutoModel.from_config(DeepseekV3Config.from_pretrained(folder), experts_implementation=NAME)


async def test_fp8_linears_do_not_bring_the_expert_weights_back(servers: list[str], float_model: Path) -> None:
    def check() -> None:
        with register(servers), torch.device("meta"):
            model = from_config(float_model)
            quantizer = FineGrainedFP8HfQuantizer(FineGrainedFP8Config(), pre_quantized=True)
            quantizer._process_model_before_weight_loading(model)
        names = [name for name, _ in model.named_parameters()]
        assert any("shared_experts.up_proj.weight_scale_inv" in name for name in names)
        assert not any(".mlp.experts." in name for name in names)

    await in_thread(check)


async def test_registering_is_idempotent_and_leaves_nothing_behind(servers: list[str]) -> None:
    post_init = PreTrainedModel.post_init

    def check() -> None:
        with register(servers, EXACT) as experts:
            assert isinstance(experts, RemoteExperts)
            assert register(servers, EXACT) is experts
            assert PreTrainedModel.post_init is not post_init
            with pytest.raises(RuntimeError, match=r"registered already; call .*unregister"):
                register(servers[:1])
        assert NAME not in ALL_EXPERTS_FUNCTIONS
        assert PreTrainedModel.post_init is post_init
        unregister()
        register(servers)
        unregister()
        assert NAME not in ALL_EXPERTS_FUNCTIONS

    await in_thread(check)


async def test_what_cannot_run_says_why(servers: list[str], float_model: Path) -> None:
    def check() -> None:
        with register(servers):
            model = from_config(float_model)
            with pytest.raises(RuntimeError, match=r"no gradients; call the model under torch\.inference_mode"):
                model(prompts())
            config = DeepseekV3Config.from_pretrained(float_model)
            config._experts_implementation = NAME
            with (
                pytest.raises(RuntimeError, match="DeepseekV3Experts is in no layer of a model"),
                torch.no_grad(),
            ):
                Experts(config)(torch.zeros(1, 256), torch.zeros(1, 4).long(), torch.ones(1, 4))
            config.moe_intermediate_size = 64
            with pytest.raises(ModelMismatch, match="moe_intermediate_size is 64 in this model and 128 on"):
                AutoModel.from_config(config, experts_implementation=NAME)

    await in_thread(check)


async def test_a_model_that_outlives_its_registration_says_so(servers: list[str], float_model: Path) -> None:
    def check() -> None:
        with register(servers):
            model = load(float_model, NAME, dtype=torch.float32)
        with pytest.raises(RuntimeError, match=r"registered no longer: use the model within 'with register"):
            logits(model, prompts())
        with register(servers):
            logits(model, prompts())
        with pytest.raises(ValueError, match="give a list with at least one host:port"):
            register(servers[0])

    await in_thread(check)
