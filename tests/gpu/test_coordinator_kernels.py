"""Routing and activation quantisation: the same choices and the same bits as the torch versions."""

import pytest
import torch

from expertd.kernels.cutile.routing.quantize import quantize_activations
from expertd.kernels.cutile.routing.top_k import route
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics.quantize import quantize_activations as torch_quantize
from expertd.kernels.numerics.routing import route as torch_route
from tests.support.markers import gpu_only

pytestmark = gpu_only

CONFIGS = {
    "deepseek-v3": MoeConfig(),
    "no powers of two": MoeConfig(n_routed_experts=160, n_group=5, topk_group=3, num_experts_per_tok=6),
    "one group": MoeConfig(n_routed_experts=8, n_group=1, topk_group=1, num_experts_per_tok=3, norm_topk_prob=False),
    "one expert a group": MoeConfig(n_routed_experts=16, n_group=16, topk_group=4, num_experts_per_tok=4),
}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_route_chooses_what_torch_chooses(config: MoeConfig, ties: bool) -> None:
    logits = torch.randn(4099, config.n_routed_experts, device="cuda") * 3
    bias = torch.randn(config.n_routed_experts, device="cuda") * 0.1
    if ties:
        logits, bias = logits.round(), torch.zeros_like(bias)
    ids = torch.full((4099, config.num_experts_per_tok), -7, dtype=torch.int32, device="cuda")
    weights = torch.full(ids.shape, torch.nan, device="cuda")
    route(logits, bias, ids, weights, config)()
    expected_ids, expected_weights = torch_route(logits, bias, config)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("tokens", "width"), [(1, 128), (3, 7168), (257, 2176)])
def test_quantize_gives_the_bits_of_the_definition(tokens: int, width: int) -> None:
    spread = torch.logspace(-6, 4, tokens * width // 128, device="cuda").view(tokens, -1, 1)
    hidden = (torch.randn(tokens, width // 128, 128, device="cuda") * spread).view(tokens, width).bfloat16()
    hidden[0, :128] = 0
    out = torch.full((tokens, width), torch.nan, device="cuda").to(torch.float8_e4m3fn)
    scales = torch.full((tokens, width // 128), torch.nan, device="cuda")
    quantize_activations(hidden, out, scales)()
    expected, expected_scales = torch_quantize(hidden.cpu())
    for stored, its_scales in ((out, scales), torch_quantize(hidden)):
        assert torch.equal(its_scales.cpu(), expected_scales)
        assert torch.equal(stored.cpu().view(torch.uint8), expected.view(torch.uint8))
