"""The Hugging Face plug-in: transformers' Mixture-of-Experts models with their routed experts on expertd servers."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from expertd.client.call.pending import PendingCall
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.fleet.discovery import as_discovery
from expertd.client.sync import SyncCoordinator
from expertd.proto.base.errors import ModelMismatch

try:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
        DeepseekV3DecoderLayer,
        DeepseekV3Model,
        DeepseekV3MoE,
    )
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeDecoderLayer, Glm4MoeModel, Glm4MoeMoE
    from transformers.models.mixtral.modeling_mixtral import MixtralDecoderLayer, MixtralModel
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeModel
    from transformers.monkey_patching import register_patch_mapping, unregister_patch_mapping
except ImportError as error:
    raise ImportError(f"{error}; {__name__} needs: pip install 'expertd[huggingface]'") from error

NAME = "expertd"
"""What `experts_implementation` is set to."""
INTERFACES: tuple[Any, ...] = (ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS)
MODELS: tuple[Any, ...] = (DeepseekV3Model, Glm4MoeModel, MixtralModel, Qwen3MoeModel)
"""transformers' models that know their layers; what wraps them, such as `...ForCausalLM`, comes along."""
LAYERS: tuple[Any, ...] = (DeepseekV3DecoderLayer, Glm4MoeDecoderLayer, MixtralDecoderLayer, Qwen3MoeDecoderLayer)
BLOCKS: tuple[Any, ...] = (DeepseekV3MoE, Glm4MoeMoE)
"""What in a layer adds shared experts to the routed ones."""
SHAPE = ("model_type", "hidden_size", "moe_intermediate_size", "n_routed_experts", "num_experts_per_tok")
"""Fields in which a model and its servers must agree."""


def register(servers: Sequence[str], config: CoordinatorConfig | None = None) -> RemoteExperts:
    """Connect to `servers` (`host:port`, together owning every expert) and make them known as "expertd".

        with register(["node0:50051", "node1:50051"]):
            model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation="expertd")
            model.generate(...)

    A model loaded like this (any `...For...` class of DeepSeek-V3, GLM-4.5-MoE, Mixtral or Qwen3-MoE, with
    `from_pretrained` or `from_config`) has no expert weights: `from_pretrained` neither reads nor allocates them,
    `from_config` allocates them and lets them go. It cannot be switched back to local experts, and what it saves lacks
    them; load it again for that. A model that was already there, switched with
    `model.set_experts_implementation("expertd")`, keeps its weights, unused, and so does a bare `AutoModel`. Where a
    layer has shared experts, they are computed here while the servers compute the routed ones.

    The same arguments again return the same registration; others raise `RuntimeError` until `unregister()` or the end
    of the `with` block. `config.output_dtype` does not matter: results have the dtype of the model's hidden states.
    Raises what `SyncCoordinator` raises when the servers cannot be used.
    """
    config = replace(config or CoordinatorConfig(), output_dtype=torch.float32)
    # A string is a sequence, too, of what are no addresses.
    as_discovery(servers)
    current = _registered()
    if current is not None:
        if (current.servers, current.config) == (tuple(servers), config):
            return current
        raise RuntimeError(f"{current} is registered already; call {__name__}.unregister() first")
    experts = RemoteExperts(servers, config)
    for interface in INTERFACES:
        interface[NAME] = experts
    for block in BLOCKS:
        block.forward = _overlapping(block.forward)
    register_patch_mapping({model.__name__: _without_experts(model) for model in MODELS})
    return experts


def unregister() -> None:
    """Disconnect and forget the servers; does nothing when none are registered."""
    experts = _registered()
    if experts is None:
        return
    unregister_patch_mapping([model.__name__ for model in MODELS])
    for block in BLOCKS:
        block.forward = block.forward.__wrapped__
    for interface in INTERFACES:
        del interface[NAME]
    for owned, _ in _living_experts():
        if owned.config._experts_implementation == NAME:
            owned.register_forward_pre_hook(_refuse)
    experts.close()


class RemoteExperts:
    """What transformers calls in place of a layer's experts; see `register`."""

    def __init__(self, servers: Sequence[str], config: CoordinatorConfig) -> None:
        self.servers = tuple(servers)
        self.config = config
        self._layers: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
        self._moe = SyncCoordinator(self.servers, config).connect()

    def close(self) -> None:
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
        return self._submit(experts, hidden, topk_ids, topk_weights).result().output.to(hidden.device, hidden.dtype)

    def run_both(self, block: Any, hidden: Tensor) -> Tensor:  # noqa: ANN401
        """What `block`, one of `BLOCKS`, makes of hidden [..., H]: its shared experts run while the servers compute.

        Raises what `__call__` does; what its shared experts raise gives the servers' part up.
        """
        _, weights, ids = block.gate(hidden)
        pending = self._submit(block.experts, hidden.view(-1, hidden.shape[-1]), ids, weights)
        try:
            shared: Tensor = block.shared_experts(hidden)
            routed = pending.result().output.to(hidden.device, hidden.dtype)
        finally:
            pending.cancel()
        return routed.view(hidden.shape) + shared

    def _submit(self, experts: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> PendingCall:
        if torch.is_grad_enabled() and (hidden.requires_grad or weights.requires_grad):
            raise RuntimeError(
                "remote experts have no gradients; call the model under torch.inference_mode() or torch.no_grad(),"
                " or after model.requires_grad_(False)"
            )
        layer = self._layers.get(experts)
        if layer is None:
            layer = self._find(experts)
        tokens = hidden if hidden.is_cuda else hidden.cpu()
        return self._moe.submit(layer, tokens, topk_ids=ids, topk_weights=weights)

    def _find(self, experts: Any) -> int:  # noqa: ANN401
        """The layer that `experts` belongs to, remembered with all others of the process.

        transformers tells an experts module neither its layer nor its parent, and models may be older than this
        registration: so the layers are looked up among the live objects, once a model.
        """
        self._layers.update(_living_experts())
        if experts not in self._layers:
            supported = " or ".join(layer.__name__ for layer in LAYERS)
            raise RuntimeError(
                f"this {type(experts).__name__} is in no {supported}; remote experts run in these only:"
                ' call model.set_experts_implementation("eager") for others'
            )
        self._check(experts.config)
        return self._layers[experts]

    def _check(self, config: Any) -> None:  # noqa: ANN401
        for field in SHAPE:
            name, there = self._moe.model.family.spell(field), getattr(self._moe.model, field)
            here = getattr(config, name, None)
            if here != there:
                raise ModelMismatch(
                    f"{name} is {here} in this model and {there} on {', '.join(self.servers)};"
                    " register servers of the same checkpoint"
                )


def _overlapping(alone: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """The forward `alone` of one of `BLOCKS`, but for those whose experts run on servers; see `run_both`."""

    @functools.wraps(alone)
    def forward(block: Any, hidden_states: Tensor) -> Tensor:  # noqa: ANN401
        experts = _registered()
        if experts is None or block.experts.config._experts_implementation != NAME:
            return alone(block, hidden_states)
        return experts.run_both(block, hidden_states)

    return forward


def _living_experts() -> list[tuple[Any, int]]:
    """The experts of all layers that there are now, with their layers."""
    layers = [found for found in gc.get_objects() if issubclass(type(found), LAYERS)]
    experts = [(getattr(layer.mlp, "experts", None), layer.self_attn.layer_idx) for layer in layers]
    return [(owned, layer) for owned, layer in experts if owned is not None]


def _refuse(experts: Any, _: object) -> None:  # noqa: ANN401
    """transformers would say that "expertd" is no valid implementation, which was not the mistake."""
    if experts.config._experts_implementation == NAME and _registered() is None:
        raise RuntimeError(
            "this model's experts are on servers that are registered no longer: use the model within"
            f" 'with register(...):', or call {__name__}.register(...) without 'with'"
        )


def _without_experts(model: Any) -> type:  # noqa: ANN401
    """transformers' class `model`, without expert weights when its experts are to run on expertd servers."""

    def build(self: Any, config: Any) -> None:  # noqa: ANN401
        model.__init__(self, config)
        if config._experts_implementation == NAME:
            _remove_experts(self)

    return type(f"{model.__name__}WithoutExperts", (model,), {"__init__": build, "__module__": __name__})


def _remove_experts(model: Any) -> None:  # noqa: ANN401
    """Leave no expert weights in a model under construction, and let none be loaded."""
    for layer in model.layers:
        experts = getattr(layer.mlp, "experts", None)
        if experts is None:
            continue
        for name, _ in list(experts.named_parameters(recurse=False)):
            delattr(experts, name)
        # There is nothing to initialise.
        experts._is_hf_initialized = True
    # The enclosing model takes both over. The checkpoint's expert weights are then skipped without a warning, and
    # FP8 quantisation does not put a module with weights in place of the empty one.
    model._keys_to_ignore_on_load_unexpected.add(r"\.mlp\.experts\.")
    model._keep_in_fp32_modules.add("mlp.experts")


def _registered() -> RemoteExperts | None:
    experts = ALL_EXPERTS_FUNCTIONS.get(NAME)
    return experts if isinstance(experts, RemoteExperts) else None
