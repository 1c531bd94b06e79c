"""The Hugging Face plug-in: transformers' Mixture-of-Experts models with their routed experts on expertd servers."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn

from expertd.client.call.pending import PendingCall
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.fleet.discovery import as_discovery
from expertd.client.integrations.huggingface_blocks import (
    blocks_of,
    has_shared,
    living_blocks,
    remove_experts,
    route,
    run_shared,
)
from expertd.client.integrations.huggingface_streams import MOST_TOKENS, Streams, beside
from expertd.client.sync import SyncCoordinator
from expertd.proto.base.errors import ModelMismatch

try:
    from transformers import PreTrainedModel
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError as error:
    raise ImportError(f"{error}; {__name__} needs: pip install 'expertd[huggingface]'") from error

NAME = "expertd"
"""What `experts_implementation` is set to."""
INTERFACES: tuple[Any, ...] = (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS)
BUILT: Any = PreTrainedModel
"""Whose `post_init` every model of transformers calls when its modules are made."""
SHAPE = ("hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
"""Fields in which a model and its servers must agree, and in the class of the blocks, which the family names."""


def register(
    servers: Sequence[str], config: CoordinatorConfig | None = None, *, stream_tokens: int = MOST_TOKENS
) -> RemoteExperts:
    """Connect to `servers` (`host:port`, together owning every expert) and make them known as "expertd".

        with register(["node0:50051", "node1:50051"]):
            model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="expertd")
            model.generate(...)

    A model of the servers' family that is made like this, by any class of transformers with `from_pretrained` or
    `from_config`, has no expert weights: `from_pretrained` neither reads nor allocates them, `from_config` allocates
    them and lets them go. It cannot be switched back to local experts, and what it saves lacks them; load it again for
    that. A model that was already there, switched with `model.set_experts_implementation("expertd")`, keeps its
    weights, unused. Where a layer has shared experts, they are computed here while the servers compute the routed ones.
    On a GPU, batches of up to `stream_tokens` are calls on its stream (`SyncCoordinator.on_stream`) where servers of
    this machine share memory; 0: none are.

    The same arguments again return the same registration; others raise `RuntimeError` until `unregister()` or the end
    of the `with` block. `config.output_dtype` does not matter: results have the dtype of the model's hidden states.
    Raises what `SyncCoordinator` raises when the servers cannot be used. Making a model of another family or shape than
    theirs raises `ModelMismatch`.
    """
    config = replace(config or CoordinatorConfig(), output_dtype=torch.float32)
    # A string is a sequence, too, of what are no addresses.
    as_discovery(servers)
    current = _registered()
    if current is not None:
        wanted = tuple(servers), config, stream_tokens
        if (current.servers, current.config, current.stream_tokens) == wanted:
            return current
        raise RuntimeError(f"{current} is registered already; call {__name__}.unregister() first")
    experts = RemoteExperts(servers, config, stream_tokens)
    for interface in INTERFACES:
        interface[NAME] = experts
    BUILT.post_init = _adopting(BUILT.post_init)
    for _, block in living_blocks(BUILT):
        experts.overlap(type(block))
    return experts


def unregister() -> None:
    """Disconnect and forget the servers; does nothing when none are registered."""
    experts = _registered()
    if experts is None:
        return
    BUILT.post_init = BUILT.post_init.__wrapped__
    for interface in INTERFACES:
        del interface[NAME]
    for _, block in living_blocks(BUILT):
        if _is_remote(block.experts):
            block.experts.register_forward_pre_hook(_refuse)
    experts.close()


class RemoteExperts:
    """What transformers calls in place of a layer's experts; see `register`."""

    def __init__(self, servers: Sequence[str], config: CoordinatorConfig, stream_tokens: int = MOST_TOKENS) -> None:
        self.servers = tuple(servers)
        self.config = config
        self.stream_tokens = stream_tokens
        self._layers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._overlapping: set[Any] = set()
        self._moe = SyncCoordinator(self.servers, config).connect()
        self._streams = Streams(self._moe, stream_tokens)

    def close(self) -> None:
        while self._overlapping:
            block = self._overlapping.pop()
            block.forward = block.forward.__wrapped__
        self._moe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if _registered() is self:
            unregister()

    def __repr__(self) -> str:
        return f"RemoteExperts({list(self.servers)})"

    def __call__(self, experts: nn.Module, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Run the experts of the module `experts`: hidden [T, H], ids and weights [T, k]; returns [T, H] like hidden.

        Raises `RuntimeError` when gradients are wanted, `ModelMismatch`, or what the servers answered.
        """
        if self._streams.side(hidden) is not None:
            return self._streams.call(self._layer(experts, hidden, topk_weights), hidden, topk_ids, topk_weights)
        return self._submit(experts, hidden, topk_ids, topk_weights).result().output.to(hidden.device, hidden.dtype)

    def adopt(self, model: nn.Module) -> None:
        """Take expert weights out of a model under construction, if its experts are to run here.

        Raises `ModelMismatch`.
        """
        blocks = list(blocks_of(model))
        for _, block in blocks:
            self.overlap(type(block))
        if any(_is_remote(block.experts) for _, block in blocks):
            self._remember(blocks)
            remove_experts(model)

    def overlap(self, block: Any) -> None:  # noqa: ANN401
        """Have objects of the class `block` run their shared experts while the servers compute; see `run_both`."""
        if block.__name__ == self._moe.model.family.source and block not in self._overlapping:
            block.forward = _overlapping(block.forward)
            self._overlapping.add(block)

    def run_both(self, block: Any, hidden: Tensor, input_ids: Tensor | None = None) -> Tensor:  # noqa: ANN401
        """What a block with shared experts makes of hidden [..., H]: they run while the servers compute.

        Raises what `__call__` does; what its shared experts raise gives the servers' part up.
        """
        flat = hidden.view(-1, hidden.shape[-1])
        ids, weights = route(block, flat, input_ids)
        side = self._streams.side(flat)
        if side is not None:
            layer = self._layer(block.experts, flat, weights)
            call = partial(self._streams.call, layer, flat, ids, weights)
            routed, shared = beside(side, call, partial(run_shared, block, flat))
            return (routed + shared).view(hidden.shape)
        pending = self._submit(block.experts, flat, ids, weights)
        try:
            shared = run_shared(block, flat)
            routed = pending.result().output.to(hidden.device, hidden.dtype)
        finally:
            pending.cancel()
        return (routed + shared).view(hidden.shape)

    def _submit(self, experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> PendingCall:
        layer = self._layer(experts, hidden, weights)
        tokens = hidden if hidden.is_cuda else hidden.cpu()
        return self._moe.submit(layer, tokens, topk_ids=ids, topk_weights=weights)

    def _layer(self, experts: nn.Module, hidden: Tensor, weights: Tensor) -> int:
        """Of `experts`. Raises `RuntimeError` where gradients are wanted."""
        if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
            raise RuntimeError(
                "remote experts have no gradients; call the model under torch.inference_mode() or torch.no_grad(),"
                " or after model.requires_grad_(False)"
            )
        layer = self._layers.get(experts)
        return self._find(experts) if layer is None else layer

    def _find(self, experts: Any) -> int:  # noqa: ANN401
        """The layer that `experts` belongs to, remembered with all others of the model.

        transformers tells an experts module neither its layer nor its parent, and models may be older than this
        registration: so the layers are looked up among the live objects, once a model.
        """
        self._remember([one for one in living_blocks(BUILT) if one[1].experts.config is experts.config])
        if experts not in self._layers:
            raise RuntimeError(
                f"this {type(experts).__name__} is in no layer of a model; remote experts run in these only:"
                ' call model.set_experts_implementation("eager") for others'
            )
        return self._layers[experts]

    def _remember(self, blocks: Sequence[tuple[int, Any]]) -> None:
        """The layers that `blocks` of one model are in."""
        for _, block in blocks[:1]:
            self._check(block)
        self._layers.update({block.experts: layer for layer, block in blocks})

    def _check(self, block: Any) -> None:  # noqa: ANN401
        served, config = self._moe.model, block.experts.config
        if type(block).__name__ != served.family.source:
            self._differs("model_type", config.model_type, served.model_type)
        for field in SHAPE:
            name, there = served.family.spell(field), getattr(served, field)
            here = getattr(config, name, None)
            if here != there:
                self._differs(name, here, there)

    def _differs(self, name: str, here: object, there: object) -> NoReturn:
        raise ModelMismatch(
            f"{name} is {here} in this model and {there} on {', '.join(self.servers)};"
            " register servers of the same checkpoint"
        )


def _adopting(alone: Callable[[Any], None]) -> Callable[[Any], None]:
    """The `post_init` of all models, after what `RemoteExperts.adopt` does."""

    @functools.wraps(alone)
    def post_init(model: Any) -> None:  # noqa: ANN401
        experts = _registered()
        if experts is not None:
            experts.adopt(model)
        alone(model)

    return post_init


def _overlapping(alone: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The forward `alone` of a block, but where others than its shared experts run on servers; see `run_both`."""

    @functools.wraps(alone)
    def forward(block: Any, hidden_states: Tensor, **named: Any) -> Tensor:  # noqa: ANN401
        experts = _registered()
        if experts is None or not _is_remote(block.experts) or not has_shared(block):
            return alone(block, hidden_states, **named)
        return experts.run_both(block, hidden_states, **named)

    return forward


def _refuse(experts: Any, _: object) -> None:  # noqa: ANN401
    """transformers would say that "expertd" is no valid implementation, which was not the mistake."""
    if _is_remote(experts) and _registered() is None:
        raise RuntimeError(
            "this model's experts are on servers that are registered no longer: use the model within"
            f" 'with register(...):', or call {__name__}.register(...) without 'with'"
        )


def _is_remote(experts: Any) -> bool:  # noqa: ANN401
    return bool(experts.config._experts_implementation == NAME)


def _registered() -> RemoteExperts | None:
    experts = ALL_EXPERTS_FUNCTIONS.get(NAME)
    return experts if isinstance(experts, RemoteExperts) else None
