import argparse
from typing import cast

import pytest

from expertd.kernels.cutile.base.launch import Gpu
from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.dequant.group_gemm import GroupGemmConfig
from expertd.kernels.cutile.dequant.layer import DequantConfig
from expertd.kernels.cutile.fast.tiles import LayerConfig
from expertd.kernels.cutile.pipeline.table import Table
from expertd.kernels.cutile.tools import tune
from expertd.kernels.cutile.tools.tuner import Tuner, WrongResult
from tests.support.fence.markers import no_gpu

SHAPE = ExpertShape()


class Predicted:
    """Times from a formula in place of a device: wide tiles are fast, tiles of 64 rows wrong, grouping pays from 3."""

    def __init__(self, arch: str) -> None:
        self.gpu = Gpu(arch, 132)
        self.shape = SHAPE

    def product(self, tokens: int, tile_m: int, name: str, gemm: GroupGemmConfig) -> float:
        if tile_m == 64:
            raise WrongResult("tiles of 64 rows are wrong here")
        return 1000 / gemm.tile_n + gemm.group

    def dequant(self, tokens: int, config: DequantConfig) -> float:
        if config.tile_m == 64:
            raise WrongResult("tiles of 64 rows are wrong here")
        return float(config.tile_m)

    def few_experts(self, tokens: int, config: DequantConfig) -> float:
        return 100.0 + abs(config.group_from - 3)

    def fast(self, tokens: int, config: LayerConfig) -> float:
        return 10.0 + config.tile_rows


def tuned(arch: str) -> tuple[str, Table]:
    tuner = Tuner(Table(), budget_s=60)
    pipeline = tune.tune_layer(tuner, cast("tune.TuningBench", Predicted(arch)), 4096)
    return pipeline, tuner.table


def test_each_choice_builds_on_those_before_it() -> None:
    pipeline, table = tuned("sm_90")
    key = SHAPE.key(4096)
    assert pipeline == table.get("pipeline", key, str) == "fast"
    config = table.get("dequant", key, DequantConfig)
    assert config is not None
    assert (config.tile_m, config.group_from) == (128, 3)
    assert config.up_gate == table.get("group_gemm.up_gate.m128", key, GroupGemmConfig)
    assert (config.up_gate.tile_n, config.up_gate.group) == (256, 4)
    assert "group_gemm.up_gate.m64" not in table.choices
    assert all("WrongResult" in reason for reason in table.choices["dequant.tiles"][key].skipped.values())
    assert len(table.choices["dequant.tiles"][key].skipped) == 1


def test_a_gpu_without_fp8_has_the_dequant_pipeline_alone() -> None:
    pipeline, table = tuned("sm_80")
    assert pipeline == "dequant"
    assert not {"fast", "pipeline"} & table.choices.keys()


@no_gpu
def test_without_a_gpu_the_command_fails(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    assert tune.run(parser.parse_args([])) == 1
    assert "no CUDA device" in capsys.readouterr().err
