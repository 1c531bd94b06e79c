"""A layer made of another one's experts and of new ones."""

import torch

from expertd.kernels.numerics.backend import spliced
from expertd.kernels.numerics.quantize import FP8


def test_experts_come_from_where_they_are_said_to_be_and_zeros_behind_them() -> None:
    generator = torch.Generator().manual_seed(0)
    base = [torch.randn(3, 4, 256, generator=generator).to(FP8), torch.rand(3, 2, generator=generator)]
    added = [torch.randn(2, 4, 256, generator=generator).to(FP8), torch.rand(2, 2, generator=generator)]
    made = spliced(base, {0: 2, 3: 0}, added, room=6)
    for old, new, out in zip(base, added, made, strict=True):
        expected = torch.stack([old[2].float(), new[0].float(), new[1].float(), old[0].float()])
        assert out.dtype == old.dtype
        assert torch.equal(out[:4].float(), expected)
        assert out.shape[0] == 6
        assert not out[4:].float().any()


def test_nothing_new_and_nothing_kept() -> None:
    base = [torch.arange(6.0).view(3, 2)]
    assert torch.equal(spliced(base, {0: 1, 1: 2}, [torch.empty(0, 2)], room=2)[0], base[0][1:])
    assert torch.equal(spliced(base, {}, [base[0][:1] + 7], room=1)[0], base[0][:1] + 7)
