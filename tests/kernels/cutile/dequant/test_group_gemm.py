import pytest
import torch

from expertd.kernels.cutile.dequant.group_gemm import TILES_M, GroupGemmConfig, candidates, group_gemm
from expertd.kernels.cutile.tools.inspect import Resources, inspect_kernel
from tests.support.serving import forked_processes

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")
CASES = [(arch, tile_m, config) for arch in ARCHS for tile_m in TILES_M for config in candidates(arch, tile_m)]


def resources(arch: str, tile_m: int, config: GroupGemmConfig) -> Resources:
    def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    a, b = meta(1024, 2048, dtype=torch.float16), meta(8, 4096, 2048, dtype=torch.float16)
    tiles = (meta(16, dtype=torch.int32), meta(1, dtype=torch.int32))
    launch = group_gemm(a, b, *tiles, meta(1024, 4096, dtype=torch.float32), tile_m, config, 132)
    return inspect_kernel(launch.kernel, launch.args, arch)


def test_no_candidate_spills_and_hopper_keeps_products_in_flight() -> None:
    with forked_processes(2) as pool:
        results = dict(zip(CASES, pool.map(resources, *zip(*CASES, strict=True)), strict=True))
    assert not {case: used for case, used in results.items() if used.spills}
    assert all(used.matrix for used in results.values())
    assert all(used.matrix_waits < 0.5 for (arch, _, _), used in results.items() if arch == "sm_90")


@pytest.mark.parametrize(("arch", "known"), [("sm_86", "sm_80"), ("sm_103", "sm_100"), ("sm_121", "sm_120")])
def test_an_unknown_architecture_takes_the_candidates_of_an_older_one(arch: str, known: str) -> None:
    for tile_m in TILES_M:
        assert candidates(arch, tile_m) == candidates(known, tile_m)
