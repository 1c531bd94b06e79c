"""Every kernel in every shipped configuration compiles without a GPU, and spills no registers on the H200."""

import json
import re
from functools import cache

import cuda.tile as ct
import pytest
import torch

from expertd.kernels.cutile.base.fp8 import has_fp8
from expertd.kernels.cutile.base.launch import Gpu, Launch
from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.dequant.group_gemm import GroupGemmConfig, group_gemm
from expertd.kernels.cutile.dequant.layer import default_config as default_dequant_config
from expertd.kernels.cutile.fast.tiles import PAIRED, LayerConfig, default_config
from expertd.kernels.cutile.tools.inspect import Resources, compile_kernel, inspect_kernel, signature
from expertd.kernels.cutile.tools.registry import META, V3, dequant_launches, fast_launches, routing_launches
from tests.support.kernels.resources import ARCH, GPU, PROCESSES, TABLE, as_table, inspected, name, unique_launches
from tests.support.kernels.routings import ROUTINGS
from tests.support.serving import forked_processes

V4_PRO = ExpertShape(48, 7168, 3072)
"""DeepSeek-V4-Pro's with 48 local experts."""
MIXTRAL = ExpertShape(8, 4096, 14336)
ACTIVATIONS = ("silu_and_mul", "swiglu_quantize", "swiglu_one_token", "gemm1_few_rows", "gemm1_wide")
SHARED_BYTES, RESERVED_BYTES = 228 << 10, 1 << 10
"""Shared memory of one of the H200's multiprocessors, and what it takes of that for itself with every block."""


UNMEASURED = {"sm_100": ("UTCQMMA", 220 << 10), "sm_120": ("QMMA", 80 << 10)}
"""GPUs that nobody has measured: their matrix instruction, and bytes that the deepest pipeline takes at least."""


def build(index: int, arch: str) -> tuple[str, Resources | str | None]:
    """Compile one launch: the complaint, or what a matrix product of the fast pipeline uses on `UNMEASURED`.

    Kernels do not travel between processes, so that each has a list of its own.
    """
    launch = unique_launches(arch)[index]
    try:
        if arch in UNMEASURED and re.match("fp8_gemm|gemm1", launch.name):
            return name(launch), inspect_kernel(launch.kernel, launch.args, arch)
        compile_kernel(launch.kernel, launch.args, arch)
    except ct.TileError as error:
        return name(launch), str(error)
    return name(launch), None


@cache
def built(arch: str) -> list[tuple[str, Resources | str | None]]:
    """Every launch of the default configurations, once for all tests."""
    count = len(unique_launches(arch))
    with forked_processes(PROCESSES) as pool:
        return list(pool.map(build, range(count), [arch] * count))


@pytest.fixture(scope="module")
def spent() -> dict[str, Resources]:
    """What every kernel shipped for the H200 uses."""
    return inspected(GPU, ARCH)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_every_default_configuration_compiles(arch: str) -> None:
    assert not {kernel: error for kernel, error in built(arch) if isinstance(error, str)}


def test_nothing_shipped_for_the_h200_spills_or_hangs(spent: dict[str, Resources]) -> None:
    assert not {kernel: resources for kernel, resources in spent.items() if resources.spills or resources.shortage}
    products = [resources for kernel, resources in spent.items() if "gemm" in kernel]
    assert products
    assert all("HGMMA" in used.matrix or "QGMMA" in used.matrix for used in products)


@pytest.mark.parametrize("arch", UNMEASURED)
def test_products_on_gpus_that_nobody_measured_do_not_spill(arch: str) -> None:
    """And the deepest of their pipelines takes most of the shared memory that a block may have: 227 and 99 KiB."""
    matrix, deepest = UNMEASURED[arch]
    found = {kernel: used for kernel, used in built(arch) if isinstance(used, Resources)}
    assert not {kernel: used for kernel, used in found.items() if used.spills or used.shortage}
    assert {used.matrix for used in found.values()} == {(matrix,)}
    assert max(used.shared for used in found.values()) > deepest


@cache
def routings() -> list[Launch]:
    """The kernels that route, of every family: each size and formula once, whatever its factor is."""
    launches = {}
    for config in ROUTINGS.values():
        for launch in routing_launches(config, 64, META):
            constants = tuple(value for value in launch.args[:-1] if not isinstance(value, torch.Tensor))
            launches[launch.kernel, constants] = launch
    return list(launches.values())


def inspect_routing(index: int, arch: str) -> tuple[str, Resources]:
    launch = routings()[index]
    return name(launch), inspect_kernel(launch.kernel, launch.args, arch)


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_120"])
def test_no_familys_routing_spills(arch: str) -> None:
    count = len(routings())
    with forked_processes(PROCESSES) as pool:
        results = list(pool.map(inspect_routing, range(count), [arch] * count))
    assert {kernel.partition("[")[0] for kernel, _ in results} == {"route", "weigh"}
    assert not {kernel: resources for kernel, resources in results if resources.spills}


def test_the_compiler_spends_what_it_spent_when_the_choices_were_measured(spent: dict[str, Resources]) -> None:
    """Otherwise they are to be measured again: another compiler has made a layer three times slower, without a word."""
    table, now = json.loads(TABLE.read_text()), as_table(spent)
    changed = {kernel: line for kernel, line in now["kernels"].items() if table["kernels"].get(kernel) != line}
    gone = set(table["kernels"]) - set(now["kernels"])
    advice = f"measure {now['toolchain']}, then: python -m tests.support.kernels.resources"
    assert (changed, gone) == ({}, set()), advice


def activations(arch: str, tokens: int, swiglu_limit: float | None, shape: ExpertShape = V3) -> list[Launch]:
    """What computes SwiGLU in each pipeline for a batch of `tokens` tokens."""
    gpu = Gpu(arch, processors=132)
    dequant = default_dequant_config(arch, tokens)
    launches = dequant_launches(shape, tokens, dequant, META, gpu, swiglu_limit=swiglu_limit)
    if has_fp8(arch):
        launches += fast_launches(shape, tokens, default_config(arch, tokens), META, gpu, swiglu_limit)
    return [launch for launch in launches if launch.name in ACTIVATIONS]


@pytest.mark.parametrize(("arch", "tokens"), [("sm_80", 1), ("sm_89", 1), ("sm_90", 1), ("sm_100", 64), ("sm_120", 64)])
def test_bounded_activations_compile(arch: str, tokens: int) -> None:
    launches = activations(arch, tokens, 10.0)
    assert launches
    for launch in launches:
        compile_kernel(launch.kernel, launch.args, arch)


@pytest.mark.parametrize(("tokens", "shape"), [(1, V3), (64, V3), (64, V4_PRO), (1024, V3)])
def test_a_bound_costs_no_registers_to_speak_of(tokens: int, shape: ExpertShape) -> None:
    pairs = zip(*(activations("sm_90", tokens, limit, shape) for limit in (None, 10.0)), strict=True)
    for free, bound in pairs:
        without, used = (inspect_kernel(launch.kernel, launch.args, "sm_90") for launch in (free, bound))
        assert signature(free.kernel, free.args).symbol != signature(bound.kernel, bound.args).symbol
        assert not used.spills
        assert used.registers <= without.registers + 8
        assert used.shared == without.shared


@cache
def mixtral_launches(arch: str) -> list[Launch]:
    """What is launched for experts with long rows."""
    gpu, tokens = Gpu(arch, processors=132), 2048
    dequant = dequant_launches(MIXTRAL, tokens, default_dequant_config(arch, tokens), META, gpu)
    return dequant + fast_launches(MIXTRAL, tokens, default_config(arch, tokens), META, gpu)


def inspect_mixtral(index: int, arch: str) -> tuple[str, Resources]:
    launch = mixtral_launches(arch)[index]
    return name(launch), inspect_kernel(launch.kernel, launch.args, arch)


def test_long_rows_do_not_spill() -> None:
    count = len(mixtral_launches("sm_90"))
    with forked_processes(PROCESSES) as pool:
        results = list(pool.map(inspect_mixtral, range(count), ["sm_90"] * count))
    assert not {kernel: resources for kernel, resources in results if resources.spills}
    assert any(kernel.startswith("silu_and_mul") for kernel, _ in results)


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "sm_120"])
@pytest.mark.parametrize("inner", [8192, 16384])
def test_swiglu_of_long_rows_does_not_spill_elsewhere(inner: int, arch: str) -> None:
    for launch in activations(arch, 2048, None, ExpertShape(8, 4096, inner)):
        assert not inspect_kernel(launch.kernel, launch.args, arch).spills


def test_two_blocks_of_paired_tiles_share_a_multiprocessor() -> None:
    launches = fast_launches(V3, 4096, LayerConfig(64, PAIRED, PAIRED), META, Gpu("sm_90", processors=132))
    products = [launch for launch in launches if launch.name == "fp8_gemm"]
    assert len(products) == 2
    for launch in products:
        resources = inspect_kernel(launch.kernel, launch.args, "sm_90")
        assert PAIRED.occupancy * (resources.shared + RESERVED_BYTES) <= SHARED_BYTES


def test_spills_are_seen() -> None:
    def meta(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    a, b = meta(1024, 2048, dtype=torch.bfloat16), meta(8, 4096, 2048, dtype=torch.bfloat16)
    tiles = (meta(8, dtype=torch.int32), meta(1, dtype=torch.int32))
    too_large = GroupGemmConfig(tile_n=256, tile_k=128, num_worker_warps=4, occupancy=2, latency=8)
    launch = group_gemm(a, b, *tiles, meta(1024, 4096, dtype=torch.float32), 128, too_large, 132)
    resources = inspect_kernel(launch.kernel, launch.args, "sm_90")
    assert resources.spills
    assert resources.stack > 0
    assert resources.local_accesses > 0
