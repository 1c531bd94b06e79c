import argparse
import json
from pathlib import Path

import pytest

from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.dequant.layer import DequantConfig
from expertd.kernels.cutile.pipeline.table import Machine, load_table
from expertd.kernels.cutile.tools import tune
from tests.support.fence.markers import gpu_only

SHAPE = ExpertShape(4, 256, 128)
OPTIONS = ["--experts", "4", "--hidden-size", "256", "--intermediate-size", "128", "--tokens", "8"]


def arguments(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    tune.add_arguments(parser)
    return parser.parse_args([*OPTIONS, *options])


@gpu_only
def test_fills_the_cache_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, export = tmp_path / "tune.json", tmp_path / "export.json"
    assert tune.run(arguments("--cache", str(cache), "--export", str(export))) == 0
    assert load_table(Machine.detect(), cache).get("dequant", SHAPE.key(8), DequantConfig) is not None
    first = json.loads(export.read_text())
    assert {"dequant", "fast", "pipeline"} <= first.keys()
    assert all(SHAPE.key(8) in shapes for shapes in first.values())
    capsys.readouterr()
    assert tune.run(arguments("--cache", str(cache), "--export", str(export))) == 0
    assert " us" not in capsys.readouterr().err
    assert json.loads(export.read_text()) == first
