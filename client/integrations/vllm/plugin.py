"""vLLM with its routed experts on expertd servers: what vLLM finds under the entry point `vllm.general_plugins`.

    EXPERTD_SERVERS=node0:50051,node1:50051 vllm serve /models/DeepSeek-V3

vLLM keeps attention, gates, routing and shared experts; it has no expert weights and loads none. Where no servers are
named, nothing changes. docs/engines.md has the settings and what is tested.
"""

from __future__ import annotations


def register() -> None:
    """Have vLLM build expertd's layer for routed experts. vLLM calls it in each of its processes, sometimes twice."""
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts

    if RoutedExperts.__name__ in op_registry_oot:
        return
    from expertd.client.integrations.vllm import experts, failures, health

    RoutedExperts.register_oot(experts.RemoteExperts, name=RoutedExperts.__name__)
    failures.install()
    health.install()
