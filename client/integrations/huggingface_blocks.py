"""Blocks of routed experts in transformers' models: finding them, emptying them, and what stands beside the experts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional


def living_blocks(kind: type) -> Iterator[tuple[int, Any]]:
    """(layer, block) of all models of `kind` that there are now."""
    for found in gc.get_objects():
        if issubclass(type(found), kind):
            yield from blocks_of(found)


def blocks_of(model: nn.Module) -> Iterator[tuple[int, Any]]:
    """(layer, block) of what in layers of `model` has experts that transformers dispatches; none of models within."""
    return ((layer, block) for layer, _, block in _named_blocks(model))


def remove_experts(model: Any) -> None:  # noqa: ANN401
    """Leave no expert weights in a model under construction, and let none be loaded."""
    for _, _, block in _named_blocks(model):
        for parameter, _ in list(block.experts.named_parameters(recurse=False)):
            delattr(block.experts, parameter)
        # There is nothing to initialise.
        block.experts._is_hf_initialized = True
    names = {name for _, name, _ in _named_blocks(model)}
    # The enclosing model takes both over. The checkpoint's expert weights are then skipped without a warning, and
    # FP8 quantisation does not put a module with weights in place of the empty one.
    ignored, kept = model._keys_to_ignore_on_load_unexpected, model._keep_in_fp32_modules
    model._keys_to_ignore_on_load_unexpected = {*(ignored or ()), *(rf"\.{name}\.experts\." for name in names)}
    model._keep_in_fp32_modules = {*(kept or ()), *(f"{name}.experts" for name in names)}


def has_shared(block: Any) -> bool:  # noqa: ANN401
    return _shared(block) is not None


def route(block: Any, hidden: Tensor, token_ids: Tensor | None) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """Expert ids and weights [T, k] that the block's router gives to hidden [T, H], or to token ids of T elements."""
    bias = getattr(block, "e_score_correction_bias", None)
    beside = token_ids if getattr(block, "is_hash", False) else bias
    _, weights, ids = block.gate(hidden) if beside is None else block.gate(hidden, beside)
    return ids, weights


def run_shared(block: Any, hidden: Tensor) -> Tensor:  # noqa: ANN401
    """What the block's shared experts add to hidden [T, H]: [T, H]."""
    output: Tensor = _shared(block)(hidden)
    gate = getattr(block, "shared_expert_gate", None)
    return output if gate is None else functional.sigmoid(gate(hidden)) * output


def _named_blocks(model: nn.Module) -> Iterator[tuple[int, str, Any]]:
    """(layer, name in the layer, block)."""
    layers = getattr(model, "layers", None)
    for index, layer in enumerate(layers if isinstance(layers, nn.ModuleList) else ()):
        for name, block in layer.named_children():
            # The decorator that has experts dispatched gives them their configuration.
            if hasattr(getattr(block, "experts", None), "config"):
                yield index, name, block


def _shared(block: Any) -> Any:  # noqa: ANN401
    return getattr(block, "shared_experts", None) or getattr(block, "shared_expert", None)
