"""LoRA adapters apply to all of a model but the experts that servers compute; adapters of such experts are refused."""

from __future__ import annotations

from collections.abc import Callable

from vllm.lora.model_manager import LoRAModelManager

from expertd.client.integrations.vllm.methods import wrap


def leave_out(experts: str) -> None:
    """In a worker, before it makes room for adapters: none for the layers named `experts`, which have no weights here.

    vLLM then refuses an adapter that has weights for them, by their names, when it loads it.
    """

    def without_experts(original: Callable[[LoRAModelManager], None], manager: LoRAModelManager) -> None:
        if manager.lora_config.target_modules and experts in manager.lora_config.target_modules:
            raise ValueError(f"--lora-target-modules names {experts!r}, which expertd servers compute; leave it out")
        manager.supported_lora_modules = [name for name in manager.supported_lora_modules if name != experts]
        original(manager)

    wrap(LoRAModelManager, "_create_lora_modules", without_experts)
