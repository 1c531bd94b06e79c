"""Formats of stored weights: which of those that configurations name are read, and what to give instead of others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MODELOPT = "hf_quant_config.json"
"""Where NVIDIA's Model Optimizer says the format, when config.json does not."""
SUPPORTED = "supported: BF16, or FP8 with weight_block_size [128, 128]"
_BLOCKS = [128, 128]


class UnsupportedFormat(ValueError):
    """Weights that expertd does not read; the message names the format and what would work."""


def check_format(fields: Mapping[str, Any]) -> None:
    """Raise `UnsupportedFormat` for what `quantization_config` in the fields of a config.json says."""
    quantization = fields.get("quantization_config")
    if quantization is None:
        return
    if not isinstance(quantization, Mapping):
        raise UnsupportedFormat(f"quantization_config is {quantization!r}; it must be an object")
    method = quantization.get("quant_method", "fp8")
    if method != "fp8":
        raise _refusal("quantization_config", _name(method, quantization))
    blocks = quantization.get("weight_block_size")
    if blocks is None:
        raise _refusal("quantization_config", "FP8 with one scale a tensor (no weight_block_size)")
    if blocks != _BLOCKS:
        raise UnsupportedFormat(f"weight_block_size is {blocks}; supported: {_BLOCKS}")


def check_folder(folder: Path) -> None:
    """Raise `UnsupportedFormat` for a format that only `MODELOPT` in a checkpoint's folder names."""
    try:
        found = json.loads((folder / MODELOPT).read_text())
    except FileNotFoundError:
        return
    except ValueError as error:
        raise UnsupportedFormat(f"{folder / MODELOPT} is not valid JSON: {error}") from None
    quantization = found.get("quantization") if isinstance(found, dict) else None
    algorithm = quantization.get("quant_algo") if isinstance(quantization, dict) else None
    if algorithm is not None:
        raise _refusal(str(folder / MODELOPT), _modelopt(algorithm))


def _refusal(where: str, name: str) -> UnsupportedFormat:
    return UnsupportedFormat(
        f"{where} says {name}, which expertd does not read; {SUPPORTED}: give the model's checkpoint in one of these"
    )


def _name(method: object, quantization: Mapping[str, Any]) -> str:
    """What people call the format."""
    if method == "modelopt":
        return _modelopt(quantization.get("quant_algo"))
    if method == "compressed-tensors":
        return f"{' and '.join(sorted(set(_compressed(quantization)))) or 'weights'} of compressed-tensors"
    return str(method).upper() if isinstance(method, str) else repr(method)


def _modelopt(algorithm: object) -> str:
    names = {"FP8": "FP8 with one scale a tensor"}
    return f"{names.get(str(algorithm), algorithm)} of modelopt"


def _compressed(quantization: Mapping[str, Any]) -> Iterator[str]:
    """ "INT4", "FP8 by channel", ... of each group of compressed-tensors."""
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else ():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if isinstance(weights, Mapping):
            kind = {"float": "FP"}.get(str(weights.get("type")), str(weights.get("type")).upper())
            by = f" by {weights['strategy']}" if kind == "FP" and "strategy" in weights else ""
            yield f"{kind}{weights.get('num_bits')}{by}"
