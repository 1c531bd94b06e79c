"""vLLM's layer of routed experts without weights: what it is asked, expertd servers compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from vllm.config import ModelConfig, VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.runner.shared_experts import SharedExpertsOrder
from vllm.model_executor.models.utils import extract_layer_index

from expertd.client.integrations.vllm import adapters, calls, failures, graphs
from expertd.client.integrations.vllm.fleet import Fleet, fleet_of
from expertd.client.integrations.vllm.settings import Settings, read
from expertd.proto.base.errors import UnknownExpert

WEIGHTS = ("w13_weight", "w2_weight")
SCALES = tuple(f"{name}_scale_inv" for name in WEIGHTS)


class RemoteExperts(RoutedExperts):  # type: ignore[misc]
    """In place of `RoutedExperts` in every model. Where no servers are named, or for drafts, it is just that."""

    def _get_quant_method(self, prefix: str, quant_config: Any, moe_config: Any) -> FusedMoEMethodBase:  # noqa: ANN401
        vllm_config = get_current_vllm_config()
        settings = read(vllm_config.additional_config)
        if settings is None or _is_draft(prefix, vllm_config.model_config):
            return super()._get_quant_method(prefix, quant_config, moe_config)
        self._refuse_unsupported(vllm_config.model_config)
        graphs.split(vllm_config.compilation_config)
        failures.count_nans()
        if vllm_config.lora_config is not None:
            adapters.leave_out(prefix.rpartition(".")[-1])
        return RemoteMethod(moe_config, settings, vllm_config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Passes over the experts' tensors, and reads none of their bytes: files are mapped."""
        if not isinstance(self.quant_method, RemoteMethod):
            yield from super().load_weights(weights)
            return
        for _ in weights:
            pass
        yield from (name for name, _ in self.named_parameters())

    def _refuse_unsupported(self, model: ModelConfig) -> None:
        """Raises `ValueError` for what servers would compute differently, or not at all, or fail in silence."""
        moe, parallel = self.moe_config, self.moe_config.moe_parallel_config
        for wrong, name, instead in (
            (model.runner_type == "pooling", "--runner pooling", "vLLM would answer NaN when a call to them failed"),
            (parallel.use_ep, "--enable-expert-parallel", "leave it out: the expertd servers are expert parallel"),
            (parallel.enable_eplb, "--enable-eplb", "use 'expertd rebalance', which moves the servers' experts"),
            (parallel.pcp_size > 1, "--prefill-context-parallel-size", "leave it at 1"),
            (moe.activation.value != "silu", f"activation {moe.activation.value}", "expertd servers compute silu"),
            (moe.has_bias, "experts with biases", "expertd servers add none"),
            (self.swiglu_limit is not None, "a clamped SwiGLU", "no model that has one was tried with vLLM yet"),
            (self.apply_router_weight_on_input, "router weights on the input", "expertd servers apply them to outputs"),
            (self.expert_map_manager.num_fused_shared_experts > 0, "fused shared experts", "switch the fusion off"),
        ):
            if wrong:
                raise ValueError(f"{name} cannot be used with experts on expertd servers; {instead}")


class RemoteMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """How one layer's experts are computed: by calls, each rank for its share of the tokens."""

    def __init__(self, moe: Any, settings: Settings, vllm_config: VllmConfig) -> None:  # noqa: ANN401
        super().__init__(moe)
        self.fleet: Fleet | None = None
        self.layer = -1
        self.rank, self.ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        self._settings = settings
        self._hf_config = vllm_config.model_config.hf_config

    @property
    def supports_internal_mk(self) -> bool:
        """Data parallel ranks exchange no tokens: each calls for its own."""
        return True

    @property
    def mk_can_overlap_shared_experts(self) -> bool:
        """`apply` runs them, while servers compute."""
        return True

    @property
    def skip_forward_padding(self) -> bool:
        return True

    def maybe_roundup_sizes(self, hidden_size: int, intermediate_size: int, *_: object) -> tuple[int, int]:
        return hidden_size, intermediate_size

    def create_weights(self, layer: RemoteExperts, *_: object, **__: object) -> None:
        """Only their names, which some models' loaders look for."""
        for name in WEIGHTS if layer.quant_config is None else (*WEIGHTS, *SCALES):
            nothing: Any = torch.nn.Parameter(torch.empty(0, dtype=torch.float32), requires_grad=False)
            nothing.weight_loader = _pass_over
            layer.register_parameter(name, nothing)
        self.layer = extract_layer_index(layer.layer_name)

    def get_fused_moe_quant_config(self, _: object) -> None:
        return None

    def process_weights_after_loading(self, layer: RemoteExperts) -> None:
        """Find the servers. Raises what `Fleet` does, and `UnknownExpert` for a layer that they do not have."""
        self.fleet = fleet_of(self._settings, self._hf_config)
        if self.layer not in self.fleet.layers:
            raise UnknownExpert(
                f"{layer.layer_name}: the expertd servers have no experts of layer {self.layer},"
                f" only of {self.fleet.layers}"
            )

    def apply(
        self,
        layer: RemoteExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,  # noqa: ANN401
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """x [T, H], weights and ids [T, k]; returns [T, H] like x, which vLLM adds over tensor parallel ranks."""
        number = calls.dispatch(x, topk_weights, topk_ids, layer.layer_name)
        if shared_experts is not None:
            shared_experts(shared_experts_input, SharedExpertsOrder.MK_INTERNAL_OVERLAPPED)
        combined: Tensor = calls.combine(number, x)
        return combined


def _is_draft(layer_name: str, model: ModelConfig) -> bool:
    """Whether a layer only guesses tokens: of a draft model, or one that predicts further tokens behind the others."""
    layers: int = model.hf_text_config.num_hidden_layers
    return bool(model.runner_type == "draft") or extract_layer_index(layer_name) >= layers


def _pass_over(*_: object, **__: object) -> bool:
    """What a model's loader calls for each expert's tensor; True: taken."""
    return True
