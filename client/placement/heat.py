"""The heat of every expert, its pairs: from JSON files, or from servers that run with --per-expert-metrics."""

from __future__ import annotations

import json
import urllib.request
from collections import Counter
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from expertd.client.placement.assignment import InvalidPlan
from expertd.client.placement.packing import Floats
from expertd.kernels.model.loads import loads_of

Heat: TypeAlias = "Counter[tuple[int, int]]"
"""Pairs by layer and expert."""
SERIES = "expertd_expert_pairs_total"
PLACEMENT = "expertd_placement_info"
TIMEOUT = 10.0


def read_heat(sources: Sequence[str]) -> tuple[tuple[int, ...], Floats]:
    """Layers, ascending, and heat [layers, experts] float64, added over all sources.

    A source is a file or an http(s) URL. It holds a JSON object from layers to lists with one number for every expert,
    or Prometheus text with `expertd_expert_pairs_total`. Raises `InvalidPlan`.
    """
    heat: Heat = Counter()
    experts = 0
    found: Heat
    models: dict[str, str] = {}
    for source in sources:
        text = _read(source)
        if _is_prometheus(source, text):
            found, told, model = _from_prometheus(source, text)
            # A part of a fleet must not pass for all of a smaller model.
            experts = max(experts, told)
            models.setdefault(model, source)
        else:
            found = _from_json(source, text)
        heat.update(found)
    if len(models) > 1:
        raise InvalidPlan(
            "--loads mixes models: " + "; ".join(f"{model!r} on {source}" for model, source in models.items())
        )
    layers = tuple(sorted({layer for layer, _ in heat}))
    experts = max(experts, 1 + max(expert for _, expert in heat))
    for key in ((layer, expert) for layer in layers for expert in range(experts)):
        if key not in heat:
            raise InvalidPlan(f"--loads says nothing of layer {key[0]}, expert {key[1]}; name a server that owns it")
    return layers, np.array([[heat[layer, expert] for expert in range(experts)] for layer in layers], np.float64)


def counts_of(page: str) -> Heat:
    """What one server's /metrics say. Raises `InvalidPlan`."""
    return _from_prometheus(page, _read(page))[0]


def parse_json(source: object, text: str) -> Any:  # noqa: ANN401
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InvalidPlan(f"{source} is not valid JSON: {error}") from None


def _read(source: str) -> str:
    try:
        if source.startswith(("http://", "https://")):
            with urllib.request.urlopen(source, timeout=TIMEOUT) as answer:
                return str(answer.read(), "utf-8")
        return Path(source).read_text()
    except HTTPException:
        raise InvalidPlan(f"{source} speaks no HTTP; give the /metrics of a server's metrics port") from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise InvalidPlan(f"--loads: {source} cannot be read: {getattr(reason, 'strerror', None) or reason}") from None
    except UnicodeDecodeError as error:
        raise InvalidPlan(f"{source} is neither JSON nor Prometheus text: {error}") from None


def _is_prometheus(source: str, text: str) -> bool:
    return SERIES in text or source.startswith(("http://", "https://"))


def _from_prometheus(source: str, text: str) -> tuple[Heat, int, str]:
    """And how many experts the model has and its fingerprint, as far as the server tells."""
    heat: Heat = Counter()
    experts, model = 0, ""
    try:
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == SERIES:
                    heat[int(sample.labels["layer"]), int(sample.labels["expert"])] += int(sample.value)
                if sample.name == PLACEMENT:
                    experts = max(experts, int(sample.labels.get("routed_experts", 0)))
                    model = sample.labels.get("model_fingerprint", "")
    except (KeyError, ValueError) as error:
        raise InvalidPlan(f"{source} is not Prometheus text of an expertd server: {error!r}") from None
    if not heat:
        raise InvalidPlan(f"{source} has no {SERIES}; start the server with --per-expert-metrics")
    return heat, experts, model


def _from_json(source: str, text: str) -> Heat:
    try:
        loads = loads_of(source, text)
    except ValueError as error:
        raise InvalidPlan(str(error)) from None
    heat: Heat = Counter()
    for layer, row in loads.items():
        heat.update({(layer, expert): pairs for expert, pairs in enumerate(row)})
    return heat
