"""FP8 block quantisation."""

import pytest
import torch

from expertd.kernels.numerics.quantize import (
    FP8,
    FP8_MAX,
    dequantize_activations,
    dequantize_weights,
    quantize_activations,
    quantize_weights,
)
from expertd.kernels.oracle.reference import relative_error


def test_activation_error_is_that_of_three_mantissa_bits() -> None:
    hidden = torch.randn(64, 1024) * torch.logspace(-3, 3, 64).unsqueeze(1)
    stored, scales = quantize_activations(hidden)
    assert (stored.dtype, scales.dtype, scales.shape) == (FP8, torch.float32, (64, 8))
    per_token = [relative_error(a, b) for a, b in zip(dequantize_activations(stored, scales), hidden, strict=True)]
    assert 0.02 < min(per_token) < max(per_token) < 0.03


def test_no_block_is_off_by_a_sixteenth() -> None:
    """The bound in docs/numerics.md: half a unit in the last of three places, whatever the values are."""
    exponents = torch.linspace(-20, 20, 64).unsqueeze(1)
    tails = torch.randn(64, 1280) * torch.exp(2 * torch.randn(64, 1280))
    # All just above where rounding is worst: midway between 256 and 288, in units of the scale.
    worst = torch.full((64, 1280), 272.0)
    worst[:, ::128] = 448.0
    for values in (torch.randn(64, 1280), torch.rand(64, 1280), tails, worst):
        exact = values * 2**exponents
        back = dequantize_activations(*quantize_activations(exact))
        blocks, errors = exact.view(-1, 128), (back - exact).view(-1, 128)
        assert (errors.norm(dim=1) < blocks.norm(dim=1) / 16).all()
        assert (errors.abs() <= blocks.abs().amax(dim=1, keepdim=True) / 28 * (1 + 1e-6)).all()
    assert (errors.norm(dim=1) > blocks.norm(dim=1) / 17.5).all(), "the bound is no better than it must be"


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_spoils_its_own_block(odd: float) -> None:
    values = torch.ones(2, 384)
    values[1, 200] = odd
    back = dequantize_activations(*quantize_activations(values))
    assert back[1, 128:256].isnan().all()
    assert back[0].isfinite().all()
    assert torch.cat([back[1, :128], back[1, 256:]]).isfinite().all()


def test_every_block_uses_the_full_range() -> None:
    stored, _ = quantize_activations(torch.randn(16, 512))
    assert torch.equal(stored.float().reshape(16, 4, 128).abs().amax(dim=-1), torch.full((16, 4), FP8_MAX))


def test_scales_belong_to_their_own_block() -> None:
    hidden = torch.ones(2, 384)
    hidden[0, 128:256] = 1000.0
    hidden[1, 256:] = 1e-3
    stored, scales = quantize_activations(hidden)
    torch.testing.assert_close(scales * FP8_MAX, torch.tensor([[1.0, 1000.0, 1.0], [1.0, 1.0, 1e-3]]))
    torch.testing.assert_close(dequantize_activations(stored, scales), hidden)


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-20])
def test_blocks_of_almost_nothing_stay_finite(value: float) -> None:
    stored, scales = quantize_activations(torch.full((1, 128), value))
    assert scales.isfinite().all()
    assert (scales > 0).all()
    torch.testing.assert_close(dequantize_activations(stored, scales), torch.full((1, 128), value), rtol=0, atol=1e-13)


def test_bfloat16_and_float32_of_the_same_values_give_the_same_bits() -> None:
    hidden = torch.randn(8, 256).bfloat16()
    (a, a_scales), (b, b_scales) = quantize_activations(hidden), quantize_activations(hidden.float())
    assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    assert torch.equal(a_scales, b_scales)


def test_weights_come_back_within_rounding_and_block_by_block() -> None:
    weight = torch.randn(2, 256, 384)
    weight[1, 128:, :128] *= 100
    stored, scales = quantize_weights(weight)
    assert scales.shape == (2, 2, 3)
    back = dequantize_weights(stored, scales)
    for block in (slice(0, 128), slice(128, 256)):
        assert relative_error(back[:, block], weight[:, block]) < 0.03
    one, one_scales = quantize_weights(weight[1])
    assert torch.equal(one.view(torch.uint8), stored[1].view(torch.uint8))
    assert torch.equal(one_scales, scales[1])
