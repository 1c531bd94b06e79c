"""The Hugging Face plug-in: transformers' Mixture-of-Experts models with their routed experts on expertd servers."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.sync import SyncCoordinator
from expertd.proto.base.errors import ModelMismatch

try:
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3Model
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeDecoderLayer, Glm4MoeModel
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
    `model.set_experts_implementation("expertd")`, keeps its weights, unused, and so does a bare `AutoModel`.

    The same arguments again return the same registration; others raise `RuntimeError` until `unregister()` or the end
    of the `with` block. `config.output_dtype` does not matter: results have the dtype of the model's hidden states.
    Raises what `SyncCoordinator` raises when the servers cannot be used.
    """
    config = replace(config or CoordinatorConfig(), output_dtype=torch.float32)
    current = _registered()
    if current is not None:
        if (current.servers, current.config) == (tuple(servers), config):
            return current
        raise RuntimeError(f"{current} is registered already; call {__name__}.unregister() first")
    experts = RemoteExperts(servers, config)
    for interface in INTERFACES:
        interface[NAME] = experts
    register_patch_mapping({model.__name__: _without_experts(model) for model in MODELS})
    return experts


def unregister() -> None:
    """Disconnect and forget the servers; does nothing when none are registered."""
    experts = _registered()
    if experts is None:
        return
    unregister_patch_mapping([model.__name__ for model in MODELS])
    for interface in INTERFACES:
        del interface[NAME]
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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if _registered() is self:
            unregister()

    def __repr__(self) -> str:
        return f"RemoteExperts({list(self.servers)})"

    def __call__(self, experts: nn.Module, hidden: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
        """Run the experts of the module `experts`: hidden [T, H], ids and weights [T, k]; returns [T, H] like hidden.

        Raises `RuntimeError` when gradients are wanted, `ModelMismatch`, or what the servers answered.
        """
        if torch.is_grad_enabled() and (hidden.requires_grad or topk_weights.requires_grad):
            raise RuntimeError(
                "remote experts have no gradients; call the model under torch.inference_mode() or torch.no_grad(),"
                " or after model.requires_grad_(False)"
            )
        layer = self._layers.get(experts)
        if layer is None:
            layer = self._find(experts)
        tokens = hidden if hidden.is_cuda else hidden.cpu()
        output = self._moe(layer, tokens, topk_ids=topk_ids, topk_weights=topk_weights)
        return output.to(hidden.device, hidden.dtype)

    def _find(self, experts: Any) -> int:  # noqa: ANN401
        """The layer that `experts` belongs to, remembered with all others of the process.

        transformers tells an experts module neither its layer nor its parent, and models may be older than this
        registration: so the layers are looked up among the live objects, once a model.
        """
        for layer in [found for found in gc.get_objects() if issubclass(type(found), LAYERS)]:
            owned = getattr(layer.mlp, "experts", None)
            if owned is not None:
                self._layers[owned] = layer.self_attn.layer_idx
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
