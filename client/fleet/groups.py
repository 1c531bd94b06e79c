"""Fleets by model, from what their servers tell: which are mixed, and which experts have no owner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from expertd.kernels.model.ranges import format_ranges


@dataclass(frozen=True, slots=True)
class Holding:
    """What one server owns, of which model."""

    address: str
    fingerprint: str
    experts: Mapping[int, Sequence[int]]
    """Of each layer."""
    routed_experts: int
    """Of the whole model, in each layer."""


def by_model(holdings: Sequence[Holding]) -> dict[str, list[Holding]]:
    """Fingerprint -> who holds that model, in the order in which they were given."""
    models: dict[str, list[Holding]] = {}
    for one in holdings:
        models.setdefault(one.fingerprint, []).append(one)
    return models


def faults(holdings: Sequence[Holding]) -> tuple[list[str], list[str]]:
    """What keeps them from being one whole fleet, and of each model of a mixed one whether it would be whole."""
    models = by_model(holdings)
    if len(models) <= 1:
        return [fault for group in models.values() for fault in _missing(group)], []
    held = "; ".join(f"{model!r} on {', '.join(one.address for one in group)}" for model, group in models.items())
    states = [f"of {model!r}: {fault}" for model, group in models.items() for fault in _missing(group) or ["whole"]]
    return [f"mixed models: {held}"], states


def name_experts(experts: Sequence[int]) -> str:
    """ "expert 7", "experts 7, 8" or "experts 0, 1, 2, 3, 4, 5, 6, 7 and 12 more"."""
    shown = ", ".join(map(str, experts[:8]))
    rest = len(experts) - 8
    return f"expert{'s' if len(experts) > 1 else ''} {shown}" + (f" and {rest} more" if rest > 0 else "")


def _missing(group: Sequence[Holding]) -> list[str]:
    """Experts of one model without an owner, with all the layers where the same ones are."""
    every = set(range(max(one.routed_experts for one in group)))
    layers: dict[tuple[int, ...], list[int]] = {}
    for layer in sorted({layer for one in group for layer in one.experts}):
        owned = {expert for one in group for expert in one.experts.get(layer, ())}
        if every > owned:
            layers.setdefault(tuple(sorted(every - owned)), []).append(layer)
    return [
        f"layers {format_ranges(where)}: nobody owns {name_experts(missing)} (--experts {format_ranges(missing)})"
        for missing, where in layers.items()
    ]
