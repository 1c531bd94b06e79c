"""Routing and activation quantisation: the same choices and the same bits as the torch versions."""

import pytest
import torch

from expertd.kernels.cutile.routing.quantize import quantize_activations
from expertd.kernels.cutile.routing.top_k import route
from expertd.kernels.cutile.routing.weigh import weigh
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics.quantize import quantize_activations as torch_quantize
from expertd.kernels.numerics.routing import route as torch_route
from expertd.kernels.numerics.routing import weigh as torch_weigh
from tests.support.fence.markers import gpu_only
from tests.support.kernels.routings import ROUTINGS, assert_routed, chosen_by_token, outputs, random_logits, tied

pytestmark = gpu_only

TOKENS = 4099


@pytest.mark.parametrize("config", ROUTINGS.values(), ids=ROUTINGS)
def test_route_chooses_what_torch_chooses(config: MoeConfig) -> None:
    logits, bias = random_logits(config, TOKENS, "cuda")
    ids, weights = outputs(TOKENS, config, "cuda")
    route(logits, bias, ids, weights, config)()
    assert_routed(ids, weights, logits, bias, config)
    even = tied(logits)
    route(even, torch.zeros_like(bias), ids, weights, config)()
    assert torch.equal(ids, torch_route(even, torch.zeros_like(bias), config)[0])


@pytest.mark.parametrize("name", ["DeepSeek-V4-Flash", "DeepSeek-V4-Pro", "DeepSeek-V3", "Qwen3-Next", "22 of 512"])
def test_weigh_gives_what_torch_gives(name: str) -> None:
    config = ROUTINGS[name]
    logits, _ = random_logits(config, TOKENS, "cuda")
    ids, (_, weights) = chosen_by_token(config, TOKENS, "cuda"), outputs(TOKENS, config, "cuda")
    weigh(logits, ids, weights, config)()
    torch.testing.assert_close(weights, torch_weigh(logits, ids, config), rtol=2e-6, atol=1e-30)


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
