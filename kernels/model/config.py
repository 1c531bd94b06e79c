"""The shape of a Mixture-of-Experts model, read from a Hugging Face `config.json`."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from expertd.kernels.model.families import FAMILIES, KNOWN_UNSUPPORTED, Family
from expertd.kernels.model.formats import UnsupportedFormat, check_folder, check_format

BLOCK = 128
"""Elements along one side of a quantisation block: 128x128 for weights, 1x128 for activations."""


class InvalidConfig(ValueError):
    """A model configuration that expertd cannot run; the message names the field and the bound."""


@dataclass(frozen=True)
class MoeConfig:
    """Counts and sizes of one model, under the names that DeepSeek-V3's config.json gives them.

    Defaults are DeepSeek-V3's. Sizes are in elements. Raises `InvalidConfig` for a model that expertd cannot run.
    """

    model_type: str = "deepseek_v3"
    hidden_size: int = 7168
    moe_intermediate_size: int = 2048
    n_routed_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    num_hidden_layers: int = 61
    first_k_dense_replace: int = 3
    moe_layer_freq: int = 1
    dense_layers: tuple[int, ...] = ()
    """Layers that are dense although those rules make them Mixtures of Experts."""
    swiglu_limit: float | None = None
    """The bound on what goes into experts' SwiGLU (`expertd.kernels.numerics.swiglu`); servers alone need it."""

    def __post_init__(self) -> None:
        spell = self.family.spell
        for field in ("hidden_size", "moe_intermediate_size"):
            size = getattr(self, field)
            if size <= 0 or size % BLOCK:
                raise InvalidConfig(f"{spell(field)} is {size}; it must be a positive multiple of {BLOCK}")
        for field, low in _LEAST.items():
            if getattr(self, field) < low:
                raise InvalidConfig(f"{spell(field)} is {getattr(self, field)}; it must be at least {low}")
        if not 0 < self.routed_scaling_factor < math.inf:
            raise InvalidConfig(
                f"routed_scaling_factor is {self.routed_scaling_factor}; it must be positive and finite"
            )
        if self.swiglu_limit is not None and not 0 < self.swiglu_limit < math.inf:
            raise InvalidConfig(f"swiglu_limit is {self.swiglu_limit}; it must be positive and finite")
        if self.n_routed_experts % self.n_group:
            raise InvalidConfig(f"n_routed_experts {self.n_routed_experts} is not divisible by n_group {self.n_group}")
        if self.topk_group > self.n_group:
            raise InvalidConfig(f"topk_group {self.topk_group} exceeds n_group {self.n_group}")
        if self.num_experts_per_tok > self.topk_group * self.experts_per_group:
            raise InvalidConfig(
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds the "
                f"{self.topk_group * self.experts_per_group} experts of topk_group {self.topk_group} groups"
            )

    @property
    def family(self) -> Family:
        return _family(self.model_type)

    @property
    def fields(self) -> dict[str, Any]:
        """All fields, but for those that only some models have and this one has not."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @property
    def experts_per_group(self) -> int:
        return self.n_routed_experts // self.n_group

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers whose MLP is a Mixture of Experts, ascending."""
        return tuple(
            layer
            for layer in range(self.first_k_dense_replace, self.num_hidden_layers)
            if layer % self.moe_layer_freq == 0 and layer not in self.dense_layers
        )

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert of one layer: three matrices of FP8 with an FP32 scale a block."""
        elements = 3 * self.hidden_size * self.moe_intermediate_size
        return elements + 4 * elements // BLOCK**2

    @classmethod
    def from_json(cls, path: Path) -> MoeConfig:
        """Read a `config.json`, and what is beside it of the weights' format; errors name the file."""
        try:
            fields = json.loads(path.read_text())
        except FileNotFoundError:
            raise InvalidConfig(f"{path} does not exist; give the folder of a Hugging Face checkpoint") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InvalidConfig(f"{path} is not valid JSON: {error}") from None
        if not isinstance(fields, dict):
            raise InvalidConfig(f"{path} holds a JSON {type(fields).__name__}; it must hold an object")
        try:
            config = cls.from_hf(fields)
        except InvalidConfig as error:
            raise InvalidConfig(f"{path}: {error}") from None
        try:
            check_folder(path.parent)
        except UnsupportedFormat as error:
            raise InvalidConfig(str(error)) from None
        return config

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> MoeConfig:
        """Build from the fields of a Hugging Face configuration, ignoring those that experts do not depend on."""
        family = _family(fields.get("model_type"))
        fields = _unnested(fields, family)
        _refuse_unsupported(fields, family)
        values = dict(family.decided)
        for name, kind in _TYPES.items():
            if name in values:
                continue
            spelling = next((one for one in family.spellings.get(name, (name,)) if fields.get(one) is not None), None)
            if spelling is not None and not (name in _LISTED and isinstance(fields[spelling], list)):
                values[name] = _typed(spelling, fields[spelling], kind)
            elif name in family.assumed:
                values[name] = family.assumed[name]
            elif name in _REQUIRED or (name == "swiglu_limit" and family.bounded):
                raise InvalidConfig(f"missing field {family.spell(name)!r}")
        values |= {name: float(values[name]) for name in _FLOATS if name in values}
        return cls(**values | _dense_layers(fields, family, values["num_hidden_layers"]))


_LEAST = {
    "n_routed_experts": 1,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_hidden_layers": 1,
    "first_k_dense_replace": 0,
    "moe_layer_freq": 1,
}
_TYPES: dict[str, type | tuple[type, ...]] = {
    "model_type": str,
    "hidden_size": int,
    "moe_intermediate_size": int,
    **dict.fromkeys(_LEAST, int),
    "routed_scaling_factor": (int, float),
    "norm_topk_prob": bool,
    "swiglu_limit": (int, float),
}
_FLOATS = ("routed_scaling_factor", "swiglu_limit")
_LISTED = ("moe_layer_freq",)
"""Fields that may be a list, with a number for each layer."""
_REQUIRED = tuple(name for name in _TYPES if name not in ("moe_layer_freq", "swiglu_limit"))


def _family(model_type: object) -> Family:
    if model_type is None:
        raise InvalidConfig("missing field 'model_type'")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise _unsupported(model_type)
    return family


def _unnested(fields: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """With the fields of the model that reads text beside those that concern all."""
    if family.nested is None:
        return fields
    if fields.get(family.nested) is None:
        raise InvalidConfig(f"missing field {family.nested!r}")
    text = _typed(family.nested, fields[family.nested], dict)
    said = {name: value for name, value in text.items() if value is not None}
    return {**fields, **said, "model_type": fields["model_type"]}


def _unsupported(model_type: object) -> InvalidConfig:
    name = str(model_type)
    reason = KNOWN_UNSUPPORTED.get(name)
    if reason is not None:
        return InvalidConfig(f"model_type {model_type!r} {reason}")
    (nearest,) = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0)
    return InvalidConfig(
        f"model_type {model_type!r} is not supported, the nearest that is: {nearest!r};"
        f" supported: {', '.join(FAMILIES)}"
    )


def _typed(name: str, value: Any, kind: type | tuple[type, ...]) -> Any:  # noqa: ANN401
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        expected = "a number" if isinstance(kind, tuple) else f"of type {kind.__name__}"
        raise InvalidConfig(f"{name} is {value!r}; it must be {expected}")
    return value


def _dense_layers(fields: Mapping[str, Any], family: Family, layers: int) -> dict[str, Any]:
    """What a configuration that lists its layers, or numbers them, says beside the first dense ones and a frequency."""
    if family.table is not None:
        # Its list says by what layers choose, not which are dense.
        return {}
    listed = _listed_layers(fields, layers)
    if listed is None:
        return {"dense_layers": _passed_over(fields, layers)}
    first = next((layer for layer, dense in enumerate(listed) if not dense), layers)
    others = tuple(layer for layer, dense in enumerate(listed) if dense and layer > first)
    return {"first_k_dense_replace": first, "moe_layer_freq": 1, "dense_layers": others}


def _listed_layers(fields: Mapping[str, Any], layers: int) -> list[bool] | None:
    """Of each layer, whether it is dense, by `mlp_layer_types` (transformers 5), a list as `moe_layer_freq` (MiMo) or
    `moe_layer_start_index` (ERNIE); None where none of these is said."""
    for name, is_dense in _LAYER_LISTS.items():
        listed = fields.get(name)
        if isinstance(listed, list):
            if len(listed) != layers:
                raise InvalidConfig(f"{name} has {len(listed)} entries; it must have one of each of {layers} layers")
            unknown = next((entry for entry in listed if entry not in is_dense), None)
            if unknown is not None:
                known = ", ".join(map(repr, is_dense))
                raise InvalidConfig(f"{name} holds {unknown!r}; supported: {known}")
            return [is_dense[entry] for entry in listed]
    if fields.get("moe_layer_start_index") is None:
        return None
    start, end, step = (_typed(name, fields.get(name, usual), int) for name, usual in _ERNIE_LAYERS.items())
    if step < 1:
        raise InvalidConfig(f"moe_layer_interval is {step}; it must be at least 1")
    last = layers - 1 if end == -1 else end
    return [not (start <= layer <= last and (layer + 1) % step == 0) for layer in range(layers)]


_LAYER_LISTS: Mapping[str, Mapping[Any, bool]] = {
    "mlp_layer_types": {"dense": True, "sparse": False},
    "moe_layer_freq": {0: True, 1: False},
}
_ERNIE_LAYERS = {"moe_layer_start_index": 0, "moe_layer_end_index": -1, "moe_layer_interval": 1}


def _passed_over(fields: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Layers that `mlp_only_layers` names or `decoder_sparse_step` passes over (Qwen3-MoE)."""
    step = _typed("decoder_sparse_step", fields.get("decoder_sparse_step", 1), int)
    if step < 1:
        raise InvalidConfig(f"decoder_sparse_step is {step}; it must be at least 1")
    named = _typed("mlp_only_layers", fields.get("mlp_only_layers") or [], list)
    return tuple(layer for layer in range(layers) if layer in named or (layer + 1) % step)


def _refuse_unsupported(fields: Mapping[str, Any], family: Family) -> None:
    """Refuse fields that would silently change the computation."""
    accepted: dict[str, tuple[object, ...]] = {
        "scoring_func": (None, family.scoring_func),
        "topk_method": (None, "noaux_tc"),
        "hidden_act": (None, "silu"),
    }
    if family.packed:
        accepted["expert_dtype"] = (None, "fp8", "fp4")
    for name, values in accepted.items():
        if fields.get(name) not in values:
            raise InvalidConfig(f"{name} is {fields[name]!r}; supported: {values[-1]!r}")
    if fields.get("swiglu_limit") is not None and not family.bounded:
        raise InvalidConfig(f"swiglu_limit is {fields['swiglu_limit']!r}; experts of this family have no such bound")
    if family.has_correction_bias and fields.get("use_routing_bias") is False:
        raise InvalidConfig("use_routing_bias is False; supported: True")
    try:
        check_format(fields)
    except UnsupportedFormat as error:
        raise InvalidConfig(str(error)) from None
