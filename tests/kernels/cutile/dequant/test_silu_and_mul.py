"""SwiGLU of rows that registers hold and of longer ones, by the kernel's source; as compiled it is tested on a GPU."""

import pytest
import torch
from torch.nn.functional import silu

from expertd.kernels.cutile.dequant.silu_and_mul import silu_and_mul
from tests.support.kernels.tiles import run


@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("width", [128, 4096, 4224, 14336, 16384])
def test_every_part_of_a_row_has_the_rows_factor(width: int, limit: float | None) -> None:
    up_gate = torch.randn(5, 2 * width, generator=torch.Generator().manual_seed(width))
    tokens, factors = torch.tensor([0, 1, -1, 2, 3], dtype=torch.int32), torch.rand(5) + 0.5
    out, out_factors = torch.full((5, width), torch.nan, dtype=torch.float16), torch.full((5,), torch.nan)
    run(silu_and_mul(up_gate, tokens, factors, out, out_factors, limit))
    up, gate = (up_gate * factors[:, None]).chunk(2, dim=1)
    if limit is not None:
        up, gate = up.clamp(-limit, limit), gate.clamp(max=limit)
    used, expected = tokens >= 0, silu(gate) * up
    torch.testing.assert_close(out_factors[used], expected.abs().amax(dim=1)[used])
    values = out[used].float() * out_factors[used, None]
    torch.testing.assert_close(values, expected[used], rtol=1e-3, atol=1e-6)
    assert out[~used].isnan().all()
    assert out_factors[~used].isnan().all()
