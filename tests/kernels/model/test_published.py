"""The config.json of models as they are published, without the fields of attention: accepted, or refused by name."""

import json
import shutil
from pathlib import Path

import pytest

from expertd.kernels.model.config import InvalidConfig, MoeConfig

DATA = Path(__file__).parent / "data"
ACCEPTED = {
    # Experts, of them a token's, H, I; first MoE layer, MoE layers.
    "DeepSeek-V3.2": (256, 8, 7168, 2048, 3, 58),
    "DeepSeek-V4-Flash": (256, 6, 4096, 2048, 0, 43),
    "DeepSeek-V4-Flash-FP8": (256, 6, 4096, 2048, 0, 43),
    "GLM-5-FP8": (256, 8, 6144, 2048, 3, 75),
    "Kimi-K2-Instruct": (384, 8, 7168, 2048, 1, 60),
    "MiMo-V2-Flash": (256, 8, 4096, 2048, 1, 47),
    "MiniMax-M2.5": (256, 8, 3072, 1536, 0, 62),
    "Mixtral-8x7B-v0.1": (8, 2, 4096, 14336, 0, 32),
    "Qwen3-235B-A22B-FP8": (128, 8, 4096, 1536, 0, 94),
    "Qwen3-VL-235B-A22B-Instruct": (128, 8, 4096, 1536, 0, 94),
    "Qwen3.5-397B-A17B": (512, 10, 4096, 1024, 0, 60),
}
REFUSED = {
    "DeepSeek-V3.1-NVFP4": r"hf_quant_config.json says NVFP4 of modelopt, .* supported: BF16, or FP8",
    "gpt-oss-20b": "model_type 'gpt_oss' has biases in its experts and a hidden_size of 2880, .* no conversion helps",
}


def read(folder: Path, model: str) -> MoeConfig:
    """As from the folder of a checkpoint that holds nothing else yet."""
    shutil.copy(DATA / f"{model}.json", folder / "config.json")
    beside = DATA / f"{model}-hf_quant_config.json"
    if beside.exists():
        shutil.copy(beside, folder / "hf_quant_config.json")
    return MoeConfig.from_json(folder / "config.json")


def test_every_configuration_has_its_verdict() -> None:
    files = {path.stem for path in DATA.glob("*.json") if not path.stem.endswith("hf_quant_config")}
    assert files == ACCEPTED.keys() | REFUSED.keys()


@pytest.mark.parametrize("model", ACCEPTED)
def test_what_is_served_is_read_with_its_sizes(model: str, tmp_path: Path) -> None:
    config = read(tmp_path, model)
    sizes = (config.n_routed_experts, config.num_experts_per_tok, config.hidden_size, config.moe_intermediate_size)
    assert (*sizes, config.moe_layers[0], len(config.moe_layers)) == ACCEPTED[model]


@pytest.mark.parametrize("model", REFUSED)
def test_what_is_not_is_refused_with_the_reason_before_weights_are_looked_for(model: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=REFUSED[model]):
        read(tmp_path, model)


def test_a_factor_that_is_null_is_one_where_the_family_says_so(tmp_path: Path) -> None:
    assert read(tmp_path, "MiMo-V2-Flash").routed_scaling_factor == 1.0


def test_the_factor_of_kimi_k2_is_its_own(tmp_path: Path) -> None:
    assert read(tmp_path, "Kimi-K2-Instruct").routed_scaling_factor == 2.827


@pytest.mark.parametrize("model", ["DeepSeek-V4-Flash", "DeepSeek-V4-Flash-FP8"])
def test_deepseek_v4_is_bounded_and_routes_alike_whoever_wrote_it(model: str, tmp_path: Path) -> None:
    config = read(tmp_path, model)
    assert (config.swiglu_limit, config.routed_scaling_factor, config.norm_topk_prob) == (10.0, 1.5, True)
    assert config.family.scoring_func == "sqrtsoftplus"
    assert config.family.expert_weight(7, 3, "down_proj") == "layers.7.ffn.experts.3.w2.weight"
    assert config.family.scales_of("layers.7.ffn.experts.3.w2.weight") == "layers.7.ffn.experts.3.w2.scale"
    owned = ("layers.0.ffn.gate.tid2eid", "layers.9.ffn.gate.bias", "layers.9.ffn.experts.0.w1.scale")
    others = ("mtp.0.ffn.gate.weight", "layers.0.ffn.shared_experts.w1.weight", "layers.0.attn.wq_a.weight")
    assert [config.family.owns(name) for name in (*owned, *others)] == [True] * 3 + [False] * 3


def test_deepseek_v4_pro_is_read_with_its_sizes() -> None:
    """As far as experts go; deepseek-ai/DeepSeek-V4-Pro says the same as Flash otherwise."""
    fields = json.loads((DATA / "DeepSeek-V4-Flash.json").read_text()) | {
        "hidden_size": 7168,
        "moe_intermediate_size": 3072,
        "n_routed_experts": 384,
        "num_hidden_layers": 61,
        "routed_scaling_factor": 2.5,
    }
    config = MoeConfig.from_hf(fields)
    assert (config.n_routed_experts, config.num_experts_per_tok, len(config.moe_layers)) == (384, 6, 61)
    assert (config.swiglu_limit, config.routed_scaling_factor) == (10.0, 2.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"expert_dtype": "nvfp4"}, "expert_dtype is 'nvfp4'; supported: 'fp4'"),
        ({"swiglu_limit": None}, "missing field 'swiglu_limit'"),
        ({"swiglu_limit": 0}, "swiglu_limit is 0.0; it must be positive and finite"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; supported: 'sqrtsoftplus'"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [32, 32]}},
            r"weight_block_size is \[32, ",
        ),
    ],
)
def test_what_would_be_another_deepseek_v4_is_refused(fields: dict[str, object], message: str) -> None:
    published = json.loads((DATA / "DeepSeek-V4-Flash.json").read_text())
    with pytest.raises(InvalidConfig, match=message):
        MoeConfig.from_hf(published | fields)


def test_layers_that_choose_by_token_id_are_no_dense_ones() -> None:
    published = json.loads((DATA / "DeepSeek-V4-Flash.json").read_text())
    listed = {"num_hidden_layers": 3, "mlp_layer_types": ["hash_moe", "hash_moe", "moe"]}
    assert MoeConfig.from_hf(published | listed).moe_layers == (0, 1, 2)


def test_one_that_routes_without_the_bias_that_its_family_has_is_refused() -> None:
    fields = json.loads((DATA / "MiniMax-M2.5.json").read_text())
    with pytest.raises(InvalidConfig, match="use_routing_bias is False; supported: True"):
        MoeConfig.from_hf(fields | {"use_routing_bias": False})


@pytest.mark.parametrize("model", ["Qwen3-VL-235B-A22B-Instruct", "Qwen3.5-397B-A17B"])
def test_what_a_nested_model_says_is_looked_at_like_the_rest(model: str) -> None:
    fields = json.loads((DATA / f"{model}.json").read_text())
    text = fields["text_config"]
    for refused, message in (
        ({"text_config": None}, "missing field 'text_config'"),
        ({"text_config": []}, r"text_config is \[\]; it must be of type dict"),
        ({"text_config": {**text, "hidden_act": "gelu"}}, "hidden_act is 'gelu'; supported: 'silu'"),
        ({"text_config": {**text, "num_experts": None}}, "missing field 'num_experts'"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config says AWQ"),
        ({"text_config": {**text, "quantization_config": {"quant_method": "awq"}}}, "quantization_config says AWQ"),
    ):
        with pytest.raises(InvalidConfig, match=message):
            MoeConfig.from_hf(fields | refused)


FORMATS = {
    "NVFP4 of modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "FP8 with one scale a tensor of modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "FP8 with one scale a tensor (no weight_block_size)": {"quant_method": "fp8", "activation_scheme": "static"},
    "INT4 of compressed-tensors": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "strategy": "group"}}},
    },
    "FP8 by channel of compressed-tensors": {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
    },
    "weights of compressed-tensors": {"quant_method": "compressed-tensors", "config_groups": None},
    "AWQ": {"quant_method": "awq"},
    "MXFP4": {"quant_method": "mxfp4"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats_are_refused_by_the_name_that_people_know(name: str) -> None:
    fields = json.loads((DATA / "DeepSeek-V3.2.json").read_text()) | {"quantization_config": FORMATS[name]}
    with pytest.raises(InvalidConfig) as refusal:
        MoeConfig.from_hf(fields)
    assert str(refusal.value) == (
        f"quantization_config says {name}, which expertd does not read; supported: BF16, or FP8 with weight_block_size"
        " [128, 128]: give the model's checkpoint in one of these"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_layer_freq": [0, 1]}, "moe_layer_freq has 2 entries; it must have one of each of 48 layers"),
        ({"moe_layer_freq": [2] * 48}, "moe_layer_freq holds 2; supported: 0, 1"),
        ({"mlp_layer_types": ["hash_moe"] * 48}, "mlp_layer_types holds 'hash_moe'; supported: 'dense', 'sparse'"),
        ({"model_type": "mimo_v3"}, "model_type 'mimo_v3' is not supported, the nearest that is: 'mimo_v2_flash'"),
    ],
)
def test_lists_of_layers_and_unknown_families_are_refused_with_what_would_do(
    fields: dict[str, object], message: str
) -> None:
    published = json.loads((DATA / "MiMo-V2-Flash.json").read_text())
    with pytest.raises(InvalidConfig) as refusal:
        MoeConfig.from_hf(published | fields)
    assert str(refusal.value).startswith(message)


def test_dense_layers_between_others_are_kept() -> None:
    published = json.loads((DATA / "MiMo-V2-Flash.json").read_text())
    config = MoeConfig.from_hf(published | {"num_hidden_layers": 5, "moe_layer_freq": [0, 1, 0, 1, 1]})
    assert (config.first_k_dense_replace, config.dense_layers, config.moe_layers) == (1, (2,), (1, 3, 4))


def test_ernies_layers_are_those_from_start_to_end_at_their_interval() -> None:
    ernie = {
        "model_type": "ernie4_5_moe",
        "hidden_size": 2560,
        "moe_intermediate_size": 1536,
        "moe_num_experts": 64,
        "moe_k": 6,
        "num_hidden_layers": 8,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 5,
        "moe_layer_interval": 2,
    }
    config = MoeConfig.from_hf(ernie)
    assert (config.n_routed_experts, config.num_experts_per_tok, config.moe_layers) == (64, 6, (1, 3, 5))
    assert MoeConfig.from_hf(ernie | {"moe_layer_end_index": -1, "moe_layer_interval": 1}).moe_layers == tuple(
        range(1, 8)
    )
