"""Routing of every family at a published size, and how kernels' choices are compared with the definition."""

from dataclasses import replace

import torch
from torch import Tensor

from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics import routing


def _routing(model_type: str, experts: int, top_k: int, scaling: float = 1.0, *, normalised: bool = True) -> MoeConfig:
    """Without groups."""
    return MoeConfig(
        model_type,
        n_routed_experts=experts,
        num_experts_per_tok=top_k,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=scaling,
        norm_topk_prob=normalised,
    )


ROUTINGS = {
    "DeepSeek-V3": MoeConfig(),
    "DeepSeek-V3.2": MoeConfig("deepseek_v32"),
    "Kimi-K2": _routing("kimi_k2", 384, 8, 2.827),
    "DeepSeek-V4-Flash": _routing("deepseek_v4", 256, 6, 1.5),
    "DeepSeek-V4-Pro": _routing("deepseek_v4", 384, 6, 2.5),
    "DeepSeek-V4-Flash-FP8": _routing("deepseek_ref", 256, 6, 1.5),
    "GLM-4.5": _routing("glm4_moe", 160, 8, 2.5),
    "GLM-5": _routing("glm_moe_dsa", 256, 8, 2.5),
    "MiMo-V2-Flash": _routing("mimo_v2_flash", 256, 8),
    "Hy3": _routing("hy_v3", 192, 8, 2.826),
    "MiniMax-M2.5": _routing("minimax_m2", 256, 8),
    "ERNIE-4.5-300B": _routing("ernie4_5_moe", 64, 8),
    "Qwen3-235B": _routing("qwen3_moe", 128, 8),
    "Qwen3-Next": _routing("qwen3_next", 512, 10),
    "Qwen3.5-397B": _routing("qwen3_5_moe", 512, 10),
    "Qwen3.5-397B, text": _routing("qwen3_5_moe_text", 512, 10),
    "Qwen3-VL-235B": _routing("qwen3_vl_moe", 128, 8),
    "Mixtral-8x7B": _routing("mixtral", 8, 2),
    "22 of 512": _routing("deepseek_v3", 512, 22, 5.0),
    "softmax, not normalised": _routing("qwen3_moe", 60, 4, normalised=False),
    "no powers of two": MoeConfig(n_routed_experts=160, n_group=5, topk_group=3, num_experts_per_tok=6),
    "one expert a group": MoeConfig(n_routed_experts=16, n_group=16, topk_group=4, num_experts_per_tok=4),
}


def random_logits(config: MoeConfig, tokens: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Seeded logits [T, E] float32, nearly equal to far apart, and the bias [E]: zeros where the family has none."""
    generator = torch.Generator().manual_seed(tokens)
    spread = torch.logspace(-1, 0.7, tokens)[:, None]
    logits = torch.randn(tokens, config.n_routed_experts, generator=generator) * spread
    bias = torch.randn(config.n_routed_experts, generator=generator) * 0.1 * config.family.has_correction_bias
    return logits.to(device), bias.to(device)


def tied(logits: Tensor) -> Tensor:
    """With many that are equal, and none so large that its score is another's."""
    return logits.clamp(-8, 8).round()


def chosen_by_token(config: MoeConfig, tokens: int, device: str = "cpu") -> Tensor:
    """Expert ids [T, k] int32 as a table of token ids has them."""
    generator = torch.Generator().manual_seed(tokens)
    table = torch.rand(100, config.n_routed_experts, generator=generator).argsort(dim=1)
    ids = table[torch.randint(100, (tokens,), generator=generator), : config.num_experts_per_tok]
    return ids.to(device, torch.int32)


def outputs(tokens: int, config: MoeConfig, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Ids and weights [T, k] that nothing was written to."""
    ids = torch.full((tokens, config.num_experts_per_tok), -7, dtype=torch.int32, device=device)
    return ids, torch.full(ids.shape, torch.nan, device=device)


def assert_routed(ids: Tensor, weights: Tensor, logits: Tensor, bias: Tensor, config: MoeConfig) -> None:
    """The definition's choices and weights, but for the order of scores that rounding alone tells apart."""
    expected_ids, expected = routing.route(logits, bias, config)
    same = (ids == expected_ids).all(dim=1)
    torch.testing.assert_close(weights[same], expected[same], rtol=2e-6, atol=1e-30)
    assert (~same).sum() <= 0.02 * len(ids)
    assert bool((ids.sort(dim=1).values.diff(dim=1) > 0).all())
    assert bool(((ids >= 0) & (ids < config.n_routed_experts)).all())
    plain = replace(config, norm_topk_prob=False, routed_scaling_factor=1.0)
    choice, best = (routing.weigh(logits, one, plain) + bias[one.long()] for one in (ids, expected_ids))
    torch.testing.assert_close(choice, best, rtol=1e-6, atol=2e-7 if bool(bias.any()) else 1e-30)
