"""The dequant pipeline's kernels against torch, on fresh random data and poisoned outputs."""

import pytest
import torch
from torch import Tensor

from expertd.kernels.cutile.base.fp8 import fp8_operand
from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.dequant.aggregate import aggregate
from expertd.kernels.cutile.dequant.group_gemm import TILES_M, GroupGemmConfig, candidates, group_gemm
from expertd.kernels.cutile.dequant.hidden import dequant_hidden
from expertd.kernels.cutile.dequant.silu_and_mul import silu_and_mul
from expertd.kernels.cutile.dequant.token_sort import sort_rows
from expertd.kernels.cutile.dequant.weights import dequant_weights
from expertd.kernels.cutile.tools.inputs import random_batch, random_weights
from expertd.kernels.numerics.quantize import dequantize_activations, dequantize_weights
from expertd.kernels.oracle.reference import relative_error
from tests.gpu.synchronisation import no_synchronisation
from tests.support.fence.markers import gpu_only

pytestmark = gpu_only

POISON = float("nan")
CUDA = torch.device("cuda")


def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, POISON, dtype=dtype, device=CUDA)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 128), (5, 7168), (257, 2176)])
def test_dequant_hidden_is_exact_and_leaves_unused_rows(tokens: int, width: int, dtype: torch.dtype) -> None:
    batch = random_batch(ExpertShape(hidden_size=width), tokens, CUDA)
    assert batch.scales is not None
    chosen = torch.randint(-1, tokens, (3 * tokens,), dtype=torch.int32, device=CUDA)
    out = poisoned(3 * tokens, width, dtype=dtype)
    dequant_hidden(batch.hidden, batch.scales, chosen, out)()
    used = chosen >= 0
    assert torch.equal(out[used], dequantize_activations(batch.hidden, batch.scales)[chosen[used]].to(dtype))
    assert out[~used].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("hidden", "intermediate"), [(7168, 2048), (2176, 640)])
def test_dequant_weights_is_exact_and_leaves_unused_slots(hidden: int, intermediate: int, dtype: torch.dtype) -> None:
    weights = random_weights(ExpertShape(4, hidden, intermediate), CUDA)
    experts = torch.tensor([2, -1, 0], dtype=torch.int32, device=CUDA)
    for weight, scales in ((weights.up_gate, weights.up_gate_scales), (weights.down, weights.down_scales)):
        out = poisoned(3, *weight.shape[1:], dtype=dtype)
        dequant_weights(weight, scales, experts, out)()
        exact = dequantize_weights(weight, scales).to(dtype)
        assert torch.equal(out[0], exact[2])
        assert torch.equal(out[2], exact[0])
        assert out[1].isnan().all()


def test_every_fp8_value_survives_as_bits() -> None:
    bits = torch.arange(256, dtype=torch.uint8, device=CUDA)
    bits[[0x7F, 0xFF]] = 0  # not a number
    values = bits.view(torch.float8_e4m3fn).unsqueeze(0)
    out = poisoned(1, 256, dtype=torch.float32)
    token = torch.zeros(1, dtype=torch.int32, device=CUDA)
    dequant_hidden(fp8_operand(values, "sm_80"), torch.ones(1, 2, device=CUDA), token, out)()
    assert torch.equal(out, values.float())


def test_dequant_weights_addresses_more_than_two_to_the_31_elements() -> None:
    weight = torch.zeros(64, 8192, 8192, dtype=torch.float8_e4m3fn, device=CUDA)
    weight[-1, -1] = torch.arange(8192, device=CUDA).remainder(16).to(torch.float8_e4m3fn)
    scales = torch.full((64, 64, 64), 0.5, device=CUDA)
    out = poisoned(1, 8192, 8192, dtype=torch.bfloat16)
    dequant_weights(weight, scales, torch.tensor([63], dtype=torch.int32, device=CUDA), out)()
    assert torch.equal(out[0], (weight[-1].float() * 0.5).bfloat16())


@pytest.mark.parametrize("width", [128, 2048, 640, 4096, 4224, 14336, 16384])
def test_silu_and_mul_is_accurate_and_leaves_unused_rows(width: int) -> None:
    up_gate = torch.randn(9, 2 * width, device=CUDA)
    factors = torch.rand(9, device=CUDA) * 8
    tokens = torch.tensor([0, 1, -1, 2, 3, 4, -1, 5, 6], dtype=torch.int32, device=CUDA)
    out, out_factors = poisoned(9, width, dtype=torch.float32), poisoned(9, dtype=torch.float32)
    silu_and_mul(up_gate, tokens, factors, out, out_factors)()
    up, gate = (up_gate.double() * factors.unsqueeze(1)).chunk(2, dim=1)
    used = tokens >= 0
    values = out[used].double() * out_factors[used].unsqueeze(1)
    assert relative_error(values, (torch.nn.functional.silu(gate) * up)[used]) < 1e-6
    assert (out[used].abs().amax(dim=1) == 1).all()
    assert out[~used].isnan().all()
    assert out_factors[~used].isnan().all()


def test_silu_and_mul_of_extreme_gates() -> None:
    gate = torch.tensor([-1e30, -200.0, -88.0, 0.0, 88.0, 1e30], device=CUDA).repeat(64)[:128]
    up_gate = torch.cat([torch.ones(128, device=CUDA), gate]).unsqueeze(0)
    out, out_factors = poisoned(1, 128, dtype=torch.float32), poisoned(1, dtype=torch.float32)
    one = torch.ones(1, device=CUDA)
    silu_and_mul(up_gate, torch.zeros(1, dtype=torch.int32, device=CUDA), one, out, out_factors)()
    torch.testing.assert_close(out[0] * out_factors, torch.nn.functional.silu(gate), rtol=1e-5, atol=1e-5)


def test_silu_and_mul_bounds_the_gate_from_above_and_up_on_both_sides_and_keeps_nan() -> None:
    values = torch.tensor([-20.0, -3.0, 3.0, 20.0], device=CUDA)
    gate, up = values.repeat(32), values.repeat_interleave(32)
    out, out_factors = poisoned(2, 128, dtype=torch.float32), poisoned(2, dtype=torch.float32)
    tokens, ones = torch.zeros(2, dtype=torch.int32, device=CUDA), torch.ones(2, device=CUDA)
    lost = torch.full((256,), torch.nan, device=CUDA)
    silu_and_mul(torch.stack([torch.cat([up, gate]), lost]), tokens, ones, out, out_factors, 10.0)()
    expected = torch.nn.functional.silu(gate.clamp(max=10)) * up.clamp(-10, 10)
    torch.testing.assert_close(out[0] * out_factors[0], expected, rtol=1e-5, atol=1e-5)
    assert out[1].isnan().all()


def test_silu_and_mul_of_zeros() -> None:
    out, out_factors = poisoned(1, 128, dtype=torch.float16), poisoned(1, dtype=torch.float32)
    token, one = torch.zeros(1, dtype=torch.int32, device=CUDA), torch.ones(1, device=CUDA)
    silu_and_mul(torch.zeros(1, 256, device=CUDA), token, one, out, out_factors)()
    assert not out.any()
    assert out_factors.isfinite().all()


CONFIGS = [(tile_m, config) for tile_m in TILES_M for config in candidates("sm_90", tile_m)]


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tile_m", "config"), CONFIGS, ids=str)
def test_group_gemm_over_ragged_tiles(tile_m: int, config: GroupGemmConfig, out_dtype: torch.dtype) -> None:
    tile_slots = torch.tensor([0, 2, 2, 2, 3, 7, 7], dtype=torch.int32, device=CUDA)
    num_tiles = torch.tensor([6], dtype=torch.int32, device=CUDA)
    a = torch.randn(7 * tile_m, 640, device=CUDA).half()
    b = torch.randn(8, 896, 640, device=CUDA).half()
    out = poisoned(len(a), 896, dtype=out_dtype)
    group_gemm(a, b, tile_slots, num_tiles, out, tile_m, config, 132)()
    for tile, slot in enumerate(tile_slots[:6].tolist()):
        rows = slice(tile * tile_m, (tile + 1) * tile_m)
        expected = (a[rows].double() @ b[slot].double().T).to(out_dtype)
        assert relative_error(out[rows], expected) < (1e-5 if out_dtype == torch.float32 else 1e-3)
    assert out[6 * tile_m :].isnan().all()


def test_group_gemm_addresses_more_than_two_to_the_31_elements() -> None:
    a = torch.randn(64, 8192, device=CUDA).half()
    b = torch.zeros(64, 8192, 8192, dtype=torch.float16, device=CUDA)
    b[-1].normal_()
    out = poisoned(64, 8192, dtype=torch.float32)
    last, one = (torch.tensor([value], dtype=torch.int32, device=CUDA) for value in (63, 1))
    group_gemm(a, b, last, one, out, 64, candidates("sm_90", 64)[0], 132)()
    assert relative_error(out, a.double() @ b[-1].double().T) < 1e-5


def test_aggregate_sums_in_the_order_of_the_slots() -> None:
    rows, factors = torch.randn(20, 2176, device=CUDA), torch.rand(20, device=CUDA)
    positions = torch.randint(-1, 20, (7, 8), dtype=torch.int32, device=CUDA)
    weights = torch.rand(7, 8, device=CUDA)
    weights[positions < 0] = POISON
    out = poisoned(7, 2176, dtype=torch.float32)
    aggregate(rows, factors, positions, weights, out)()
    scaled = rows * factors.unsqueeze(1)
    terms = torch.where((positions >= 0)[..., None], scaled[positions.clamp(min=0)] * weights[..., None], 0.0)
    torch.testing.assert_close(out, terms.sum(dim=1), rtol=1e-5, atol=1e-5)


def test_sorting_does_not_wait_for_the_device() -> None:
    batch = random_batch(ExpertShape(hidden_size=128), 257, CUDA)
    expected = sort_rows(batch.expert_ids.cpu(), 32, 32, 64)
    with no_synchronisation():
        rows = sort_rows(batch.expert_ids, 32, 32, 64)
    for name in ("tokens", "positions", "experts", "num_tiles", "tile_slots", "pairs"):
        assert torch.equal(getattr(rows, name).cpu(), getattr(expected, name))
