"""Routing against transformers' DeepseekV3TopkRouter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics.routing import first_repeat, route, router_logits


def transformers_router(config: MoeConfig, weight: Tensor, bias: Tensor) -> torch.nn.Module:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    router = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=config.hidden_size,
            n_routed_experts=config.n_routed_experts,
            num_experts_per_tok=config.num_experts_per_tok,
            n_group=config.n_group,
            topk_group=config.topk_group,
            routed_scaling_factor=config.routed_scaling_factor,
            norm_topk_prob=config.norm_topk_prob,
        )
    )
    router.load_state_dict({"weight": weight, "e_score_correction_bias": bias})
    return router


@pytest.mark.parametrize(
    "config",
    [
        MoeConfig(hidden_size=512),
        MoeConfig(hidden_size=512, norm_topk_prob=False),
        MoeConfig(hidden_size=512, n_routed_experts=64, n_group=1, topk_group=1, num_experts_per_tok=6),
        MoeConfig(hidden_size=512, n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4),
        MoeConfig(hidden_size=512, n_routed_experts=384, n_group=1, topk_group=1, routed_scaling_factor=2.827),
        MoeConfig(hidden_size=512, n_routed_experts=512, n_group=1, topk_group=1, num_experts_per_tok=22),
    ],
    ids=["deepseek-v3", "unnormalised", "one group", "small", "kimi-k2", "22 of 512"],
)
def test_ten_thousand_tokens_choose_as_transformers_does(config: MoeConfig) -> None:
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(config.n_routed_experts, 512, generator=generator) * 512**-0.5
    bias = torch.randn(config.n_routed_experts, generator=generator) * 0.1
    hidden = torch.randn(10_000, 512, generator=generator)
    ids, weights = route(router_logits(hidden, weight), bias, config)
    with torch.inference_mode():
        _, theirs, their_ids = transformers_router(config, weight, bias)(hidden)
    order, their_order = ids.argsort(dim=1), their_ids.argsort(dim=1)
    assert torch.equal(ids.gather(1, order).long(), their_ids.gather(1, their_order))
    torch.testing.assert_close(weights.gather(1, order), theirs.gather(1, their_order), rtol=1e-6, atol=0)


@pytest.mark.parametrize("normalised", [True, False])
def test_ten_of_512_experts_are_chosen_as_qwen3_next_does(normalised: bool) -> None:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next import modeling_qwen3_next

    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(512, 256, generator=generator) * 256**-0.5
    hidden = torch.randn(2_000, 256, generator=generator)
    sizes: dict[str, Any] = {"hidden_size": 256, "num_experts_per_tok": 10, "norm_topk_prob": normalised}
    modeling: Any = modeling_qwen3_next
    router = modeling.Qwen3NextTopKRouter(Qwen3NextConfig(**sizes, num_experts=512))
    router.load_state_dict({"weight": weight})
    fixed = {"model_type": "qwen3_next", "num_experts": 512, "moe_intermediate_size": 128, "num_hidden_layers": 1}
    config = MoeConfig.from_hf(sizes | fixed)
    ids, weights = route(router_logits(hidden, weight), torch.zeros(512), config)
    with torch.inference_mode():
        _, theirs, their_ids = router(hidden)
    order, their_order = ids.argsort(dim=1), their_ids.argsort(dim=1)
    assert torch.equal(ids.gather(1, order).long(), their_ids.gather(1, their_order))
    torch.testing.assert_close(weights.gather(1, order), theirs.gather(1, their_order), rtol=1e-5, atol=0)


def test_scores_of_sqrtsoftplus_choose_as_deepseek_v4_does() -> None:
    from transformers import DeepseekV4Config
    from transformers.models.deepseek_v4 import modeling_deepseek_v4

    sizes: dict[str, Any] = {"hidden_size": 256, "num_experts_per_tok": 6, "routed_scaling_factor": 1.5}
    config = MoeConfig("deepseek_v4", n_routed_experts=256, n_group=1, topk_group=1, **sizes)
    generator = torch.Generator().manual_seed(5)
    weight = torch.randn(256, 256, generator=generator) * 256**-0.5
    bias = torch.randn(256, generator=generator) * 0.1
    # Logits from near zero to far out, where softplus is a line or flat.
    hidden = torch.randn(2_000, 256, generator=generator) * torch.logspace(-2, 2, 2_000)[:, None]
    modeling: Any = modeling_deepseek_v4
    router = modeling.DeepseekV4TopKRouter(DeepseekV4Config(**sizes, n_routed_experts=256))
    router.load_state_dict({"weight": weight, "e_score_correction_bias": bias})
    ids, weights = route(router_logits(hidden, weight), bias, config)
    with torch.inference_mode():
        _, theirs, their_ids = router(hidden)
    order, their_order = ids.argsort(dim=1), their_ids.argsort(dim=1)
    assert torch.equal(ids.gather(1, order).long(), their_ids.gather(1, their_order))
    torch.testing.assert_close(weights.gather(1, order), theirs.gather(1, their_order), rtol=1e-6, atol=0)


def test_ties_go_to_the_lower_expert_and_the_lower_group() -> None:
    config = MoeConfig(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=3)
    ids, weights = route(torch.zeros(2, 16), torch.zeros(16), config)
    assert ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(weights, torch.full((2, 3), 2.5 / 3))


def test_a_tie_between_later_experts_goes_to_the_lower() -> None:
    config = MoeConfig(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=2)
    logits = torch.full((1, 16), -4.0)
    logits[0, [5, 9, 13, 14]] = 3.0
    # Group 3 holds two high scores and comes first; groups 1 and 2 tie for the second place.
    assert route(logits, torch.zeros(16), config)[0].tolist() == [[5, 13]]


def test_the_bias_changes_the_choice_but_not_the_weights() -> None:
    config = MoeConfig(n_routed_experts=8, n_group=1, topk_group=1, num_experts_per_tok=2, routed_scaling_factor=1.0)
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0, -3.0, -4.0, -5.0]])
    bias = torch.zeros(8)
    bias[7] = 5.0
    ids, weights = route(logits, bias, config)
    assert ids.tolist() == [[7, 0]]
    scores = logits[0, [7, 0]].sigmoid()
    torch.testing.assert_close(weights[0], scores / scores.sum())


def test_experts_outside_the_kept_groups_are_never_chosen_even_with_negative_choice_scores() -> None:
    config = MoeConfig(n_routed_experts=16, n_group=4, topk_group=1, num_experts_per_tok=4)
    logits = torch.zeros(1, 16)
    logits[0, 8:12] = 1.0
    ids, _ = route(logits, torch.full((16,), -3.0), config)
    assert ids.tolist() == [[8, 9, 10, 11]]


def test_repeated_experts_are_found_and_absent_slots_are_not_repeats() -> None:
    ids = torch.tensor([[1, 2, 3], [-1, -1, 4], [5, 0, 5]], dtype=torch.int32)
    assert first_repeat(ids.numpy()) == 2
    assert first_repeat(ids[:2].numpy()) is None
    assert [first_repeat(row[None].numpy()) for row in ids] == [None, None, 0]
