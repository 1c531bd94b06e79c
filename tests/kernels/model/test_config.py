import json
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import DeepseekV3Config, Glm4MoeConfig, MixtralConfig

from expertd.kernels.model.config import InvalidConfig, MoeConfig
from expertd.kernels.model.families import FAMILIES

# From the config.json of deepseek-ai/DeepSeek-V3; DeepSeek-R1's says the same.
DEEPSEEK_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "aux_loss_alpha": 0.001,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "type": "yarn"},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "vocab_size": 129280,
}
PUBLISHED = {
    "V3 and R1": DEEPSEEK_V3,
    "V3.1": DEEPSEEK_V3 | {"quantization_config": {**DEEPSEEK_V3["quantization_config"], "scale_fmt": "ue8m0"}},
    "BF16 conversion": {name: value for name, value in DEEPSEEK_V3.items() if name != "quantization_config"},
    "quantization_config null": DEEPSEEK_V3 | {"quantization_config": None},
}
SMALL: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "hidden_size": 256,
    "moe_intermediate_size": 128,
    "n_routed_experts": 12,
    "num_experts_per_tok": 4,
    "n_group": 3,
    "topk_group": 2,
    "routed_scaling_factor": 1,
    "norm_topk_prob": False,
    "num_hidden_layers": 7,
    "first_k_dense_replace": 2,
    "moe_layer_freq": 2,
}


@pytest.mark.parametrize("fields", PUBLISHED.values(), ids=PUBLISHED)
def test_published_configurations_are_read(fields: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    assert MoeConfig.from_json(path) == MoeConfig(
        model_type="deepseek_v3",
        hidden_size=7168,
        moe_intermediate_size=2048,
        n_routed_experts=256,
        num_experts_per_tok=8,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        num_hidden_layers=61,
        first_k_dense_replace=3,
        moe_layer_freq=1,
    )


def test_the_configuration_of_transformers_is_read() -> None:
    assert MoeConfig.from_hf(DeepseekV3Config().to_dict()) == MoeConfig()


def test_a_configuration_saved_by_transformers_is_read(tmp_path: Path) -> None:
    DeepseekV3Config(hidden_size=512, n_routed_experts=64, n_group=4, topk_group=2).save_pretrained(tmp_path)
    assert MoeConfig.from_json(tmp_path / "config.json") == MoeConfig(
        hidden_size=512, n_routed_experts=64, n_group=4, topk_group=2
    )


def test_every_size_comes_from_the_file() -> None:
    config = MoeConfig.from_hf(SMALL)
    assert {name: getattr(config, name) for name in SMALL} == SMALL
    assert config.experts_per_group == 4


def test_fields_that_experts_do_not_depend_on_are_ignored() -> None:
    assert MoeConfig.from_hf(SMALL | {"vocab_size": "many", "rope_theta": None}) == MoeConfig.from_hf(SMALL)


@pytest.mark.parametrize(
    ("layers", "dense", "frequency", "expected"),
    [
        (61, 3, 1, tuple(range(3, 61))),
        (3, 1, 1, (1, 2)),
        (7, 2, 2, (2, 4, 6)),
        (8, 1, 3, (3, 6)),
        (4, 0, 1, (0, 1, 2, 3)),
        (4, 4, 1, ()),
    ],
)
def test_moe_layers_follow_the_dense_ones_at_their_frequency(
    layers: int, dense: int, frequency: int, expected: tuple[int, ...]
) -> None:
    config = MoeConfig(num_hidden_layers=layers, first_k_dense_replace=dense, moe_layer_freq=frequency)
    assert config.moe_layers == expected


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": (
        {"model_type": "glm_moe"},
        f"model_type 'glm_moe' is not supported, the nearest that is: 'glm4_moe'; supported: {', '.join(FAMILIES)}",
    ),
    "softmax scores": ({"scoring_func": "softmax"}, "scoring_func is 'softmax'; supported: 'sigmoid'"),
    "another choice": ({"topk_method": "greedy"}, "topk_method is 'greedy'; supported: 'noaux_tc'"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
    "another block": (
        {"quantization_config": {"weight_block_size": [64, 128]}},
        "weight_block_size is [64, 128]; supported: [128, 128]",
    ),
    "a block of one side": (
        {"quantization_config": {"weight_block_size": [128]}},
        "weight_block_size is [128]; supported: [128, 128]",
    ),
    "a ragged hidden size": ({"hidden_size": 200}, "hidden_size is 200; it must be a positive multiple of 128"),
    "no hidden size": ({"hidden_size": 0}, "hidden_size is 0; it must be a positive multiple of 128"),
    "a negative hidden size": ({"hidden_size": -128}, "hidden_size is -128; it must be a positive multiple of 128"),
    "a ragged intermediate size": (
        {"moe_intermediate_size": 1},
        "moe_intermediate_size is 1; it must be a positive multiple of 128",
    ),
    "no experts": ({"n_routed_experts": 0}, "n_routed_experts is 0; it must be at least 1"),
    "no experts a token": ({"num_experts_per_tok": 0}, "num_experts_per_tok is 0; it must be at least 1"),
    "no groups": ({"n_group": 0}, "n_group is 0; it must be at least 1"),
    "no kept groups": ({"topk_group": 0}, "topk_group is 0; it must be at least 1"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be at least 1"),
    "negative dense layers": (
        {"first_k_dense_replace": -1},
        "first_k_dense_replace is -1; it must be at least 0",
    ),
    "no frequency": ({"moe_layer_freq": 0}, "moe_layer_freq is 0; it must be at least 1"),
    "uneven groups": ({"n_group": 5}, "n_routed_experts 12 is not divisible by n_group 5"),
    "more kept groups than groups": ({"topk_group": 4}, "topk_group 4 exceeds n_group 3"),
    "more experts a token than kept": (
        {"num_experts_per_tok": 9},
        "num_experts_per_tok 9 exceeds the 8 experts of topk_group 2 groups",
    ),
    "text for a size": ({"hidden_size": "256"}, "hidden_size is '256'; it must be of type int"),
    "a fraction for a count": ({"n_routed_experts": 12.0}, "n_routed_experts is 12.0; it must be of type int"),
    "a truth value for a count": ({"n_group": True}, "n_group is True; it must be of type int"),
    "a short list": ({"moe_layer_freq": [1, 0]}, "moe_layer_freq has 2 entries; it must have one of each of 7 layers"),
    "a count for a truth value": ({"norm_topk_prob": 1}, "norm_topk_prob is 1; it must be of type bool"),
    "text for a factor": ({"routed_scaling_factor": "2.5"}, "routed_scaling_factor is '2.5'; it must be a number"),
    "a truth value for a factor": (
        {"routed_scaling_factor": True},
        "routed_scaling_factor is True; it must be a number",
    ),
    "a number for the type": (
        {"model_type": 3},
        f"model_type 3 is not supported, the nearest that is: 'hy_v3'; supported: {', '.join(FAMILIES)}",
    ),
}


@pytest.mark.parametrize(("change", "message"), REFUSALS.values(), ids=REFUSALS)
def test_what_cannot_be_run_is_refused_with_field_and_bound(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig) as refusal:
        MoeConfig.from_hf(SMALL | change)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    "field",
    [
        *("model_type", "hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok"),
        *("n_group", "topk_group", "routed_scaling_factor", "norm_topk_prob"),
        *("num_hidden_layers", "first_k_dense_replace"),
    ],
)
def test_a_missing_field_is_named(field: str) -> None:
    absent = {name: value for name, value in SMALL.items() if name != field}
    for fields in (absent, SMALL | {field: None}):
        with pytest.raises(InvalidConfig, match=f"^missing field '{field}'$"):
            MoeConfig.from_hf(fields)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), -1.0, 0])
def test_a_scaling_factor_that_is_not_positive_and_finite_is_refused(factor: float) -> None:
    with pytest.raises(InvalidConfig, match=r"routed_scaling_factor is .*; it must be positive and finite"):
        MoeConfig.from_hf(SMALL | {"routed_scaling_factor": factor})


def test_one_and_one_point_zero_are_the_same_configuration() -> None:
    whole, fraction = (MoeConfig.from_hf(SMALL | {"routed_scaling_factor": factor}) for factor in (1, 1.0))
    assert repr(whole) == repr(fraction)


@pytest.mark.parametrize(
    "quantization", ["fp8", {"quant_method": "awq"}, {"quant_method": "fp8", "weight_block_size": 128}]
)
def test_other_quantisation_is_refused(quantization: object) -> None:
    with pytest.raises(InvalidConfig, match=r"^(quantization_config|weight_block_size) (is|says) "):
        MoeConfig.from_hf(SMALL | {"quantization_config": quantization})


def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content, complaint in ((b"[]", "holds a JSON list; it must hold an object"), (b"\xff", "is not valid JSON")):
        path.write_bytes(content)
        with pytest.raises(InvalidConfig, match=f"{path} {complaint}"):
            MoeConfig.from_json(path)


def test_refusals_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL | {"hidden_size": 200}))
    with pytest.raises(InvalidConfig) as refusal:
        MoeConfig.from_json(path)
    assert str(refusal.value) == f"{path}: hidden_size is 200; it must be a positive multiple of 128"


def test_a_missing_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(InvalidConfig) as refusal:
        MoeConfig.from_json(path)
    assert str(refusal.value) == f"{path} does not exist; give the folder of a Hugging Face checkpoint"


@pytest.mark.parametrize("content", ["", "{", '{"hidden_size": 1,}'], ids=["empty", "cut", "trailing comma"])
def test_a_file_that_is_not_json_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InvalidConfig) as refusal:
        MoeConfig.from_json(path)
    assert str(refusal.value).startswith(f"{path} is not valid JSON: ")


QWEN3_MOE: dict[str, Any] = {
    # From the config.json of Qwen/Qwen3-30B-A3B.
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
}


def test_qwen3_moe_is_read() -> None:
    expected = MoeConfig(
        model_type="qwen3_moe",
        hidden_size=2048,
        moe_intermediate_size=768,
        n_routed_experts=128,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=1.0,
        num_hidden_layers=48,
        first_k_dense_replace=0,
    )
    assert MoeConfig.from_hf(QWEN3_MOE) == expected
    renamed = {("num_local_experts" if name == "num_experts" else name): value for name, value in QWEN3_MOE.items()}
    assert MoeConfig.from_hf(renamed) == expected
    assert expected.moe_layers == tuple(range(48))
    assert expected.family.expert_weight(3, 7, "up_proj") == "model.layers.3.mlp.experts.7.up_proj.weight"


def test_dense_layers_of_qwen3_moe_are_those_named_and_those_passed_over() -> None:
    config = MoeConfig.from_hf(
        QWEN3_MOE | {"num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [3, 99]}
    )
    assert config.moe_layers == (1, 5, 7)


def test_mixtral_is_read() -> None:
    config = MoeConfig.from_hf(MixtralConfig().to_dict())
    assert (config.moe_intermediate_size, config.n_routed_experts, config.num_experts_per_tok) == (14336, 8, 2)
    assert (config.norm_topk_prob, config.moe_layers) == (True, tuple(range(32)))
    assert [config.family.expert_weight(0, 1, f"{name}_proj").split(".")[-2] for name in ("gate", "down", "up")] == [
        *("w1", "w2", "w3")
    ]


def test_glm_4_5_air_is_read() -> None:
    config = MoeConfig.from_hf(Glm4MoeConfig(first_k_dense_replace=1, routed_scaling_factor=1.0).to_dict())
    assert (config.hidden_size, config.moe_intermediate_size, config.n_routed_experts) == (4096, 1408, 128)
    assert (config.n_group, config.moe_layers) == (1, tuple(range(1, 46)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (QWEN3_MOE | {"num_experts": None}, "missing field 'num_experts'"),
        (QWEN3_MOE | {"num_experts": "8"}, "num_experts is '8'; it must be of type int"),
        (QWEN3_MOE | {"num_experts": 0}, "num_experts is 0; it must be at least 1"),
        (QWEN3_MOE | {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'; supported: 'softmax'"),
        (QWEN3_MOE | {"decoder_sparse_step": 0}, "decoder_sparse_step is 0; it must be at least 1"),
        (QWEN3_MOE | {"mlp_only_layers": 3}, "mlp_only_layers is 3; it must be of type list"),
        (QWEN3_MOE | {"swiglu_limit": 7.0}, "swiglu_limit is 7.0; experts of this family have no such bound"),
        (
            MixtralConfig(intermediate_size=200).to_dict(),
            "intermediate_size is 200; it must be a positive multiple of 128",
        ),
    ],
)
def test_refusals_speak_as_the_familys_configuration_does(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig) as refusal:
        MoeConfig.from_hf(fields)
    assert str(refusal.value) == message


@pytest.mark.parametrize("limit", [0.0, -1.0, math.inf, math.nan])
def test_a_bound_that_bounds_nothing_or_everything_is_refused(limit: float) -> None:
    with pytest.raises(InvalidConfig, match=r"swiglu_limit is .*; it must be positive and finite"):
        MoeConfig(swiglu_limit=limit)


def test_what_a_model_has_not_does_not_name_it() -> None:
    assert "swiglu_limit" not in MoeConfig().fields
    assert MoeConfig(swiglu_limit=10.0).fields == MoeConfig().fields | {"swiglu_limit": 10.0}
