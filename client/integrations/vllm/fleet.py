"""The servers that compute a process's experts: found and checked when an engine starts, called by every layer."""

from __future__ import annotations

import logging
import time
from dataclasses import fields
from typing import Any

from torch import Tensor

from expertd.client.call.pending import PendingCall
from expertd.client.integrations.vllm.settings import Settings
from expertd.client.sync import SyncCoordinator
from expertd.kernels.model.config import MoeConfig
from expertd.proto.base.errors import ExpertdError, ModelMismatch

# vLLM shows what its own loggers say.
log = logging.getLogger("vllm.expertd")
TRY_SECONDS, TELL_SECONDS = 1.0, 10.0
SHARED_TOKENS = 16
"""Tokens for each tensor parallel rank from which ranks share the call; the first makes smaller ones alone."""


class Fleet:
    """One connection of this process to the servers, for all layers of an engine."""

    def __init__(self, settings: Settings, model: MoeConfig) -> None:
        """Waits until every expert of `model` has an owner, `settings.wait` seconds at most.

        Raises what `SyncCoordinator.connect` raised last; `ModelMismatch`, at once, when servers hold another model.
        """
        self._moe = _connected(settings)
        try:
            check_same(model, self._moe.model)
        except ModelMismatch:
            self._moe.close()
            raise
        weights = len(model.moe_layers) * model.n_routed_experts * 3 * model.hidden_size * model.moe_intermediate_size
        log.info(
            "the experts of %d layers are on expertd servers (%s): %.1f billion weights that are not here",
            *(len(model.moe_layers), ", ".join(sorted(self._moe.backends)), weights / 1e9),
        )

    @property
    def layers(self) -> tuple[int, ...]:
        return self._moe.layers

    def submit(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor) -> PendingCall:
        """Begin a call: hidden [T, H], ids and weights [T, k]; its result is [T, H] FP32. Raises what
        `SyncCoordinator.submit` does."""
        return self._moe.submit(layer, hidden, topk_ids=ids, topk_weights=weights)


def check_same(here: MoeConfig, there: MoeConfig) -> None:
    """Raises `ModelMismatch` naming the first field in which the engine's model and the servers' differ."""
    for field in fields(MoeConfig):
        ours, theirs = getattr(here, field.name), getattr(there, field.name)
        if ours != theirs:
            name = here.family.spell(field.name)
            raise ModelMismatch(
                f"{name} is {ours!r} in vLLM's model and {theirs!r} on the expertd servers;"
                " serve the checkpoint that vLLM loads"
            )


def share(tokens: int, rank: int, ranks: int) -> slice:
    """The rows that `rank` of `ranks` calls for: all together are all rows, each once."""
    if tokens < SHARED_TOKENS * ranks:
        return slice(0, tokens if rank == 0 else 0)
    return slice(tokens * rank // ranks, tokens * (rank + 1) // ranks)


def _connected(settings: Settings) -> SyncCoordinator:
    began, told = time.monotonic(), 0.0
    while True:
        try:
            return SyncCoordinator(settings.servers, settings.config).connect()
        except ModelMismatch:
            raise
        except (ExpertdError, OSError, ValueError) as error:
            waited = time.monotonic() - began
            if waited >= settings.wait:
                raise
            if waited >= told:
                told = waited + TELL_SECONDS
                log.warning("waiting for experts, for another %.0f s: %s", settings.wait - waited, error)
        time.sleep(TRY_SECONDS)


_fleets: list[tuple[Settings, MoeConfig, Fleet]] = []
"""One for each engine of the process, or for several whose servers and model are the same."""


def fleet_of(settings: Settings, hf_config: Any) -> Fleet:  # noqa: ANN401
    """The process's fleet for transformers' configuration of a model; the first caller waits for it.

    Raises what `Fleet` does, and `ValueError` for a model that expertd cannot serve.
    """
    model = MoeConfig.from_hf(hf_config.to_dict())
    for *of, fleet in _fleets:
        if of == [settings, model]:
            return fleet
    fleet = Fleet(settings, model)
    _fleets.append((settings, model, fleet))
    return fleet
