import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import cuda.tile as ct
import pytest
import torch

from expertd.kernels.cutile.pipeline.table import (
    BUDGET_SPENT,
    Choice,
    Machine,
    Table,
    decode,
    encode,
    load_table,
    source_hash,
    store_table,
)
from expertd.kernels.cutile.tools.tuner import Tuner, WrongResult

MACHINE = Machine(gpu="Some GPU", driver="580.1", cuda_tile="1.7.0", tileiras="13.4", sources="abc")


@dataclass(frozen=True)
class Tiles:
    m: int = 64
    n: int = 128


@dataclass(frozen=True)
class Pair:
    first: Tiles
    second: Tiles
    threshold: int = 4


def multiply_in_blocks(tiles: Tiles) -> float:
    """Microseconds of a blocked product on the CPU; a wrong one where the tiles do not divide the matrix."""
    a, b = torch.randn(128, 128), torch.randn(128, 128)
    start = time.perf_counter()
    out = torch.zeros(128, 128)
    for i in range(0, 128 - tiles.m + 1, tiles.m):
        for j in range(0, 128 - tiles.n + 1, tiles.n):
            out[i : i + tiles.m, j : j + tiles.n] = a[i : i + tiles.m] @ b[:, j : j + tiles.n]
    microseconds = (time.perf_counter() - start) * 1e6
    if not torch.allclose(out, a @ b, atol=1e-4):
        raise WrongResult("the product is not that of the reference")
    return microseconds


def test_chooses_the_fastest_and_skips_the_wrong_with_its_reason() -> None:
    tuner = Tuner(Table(), budget_s=60)
    candidates = [Tiles(96, 96), Tiles(2, 2), Tiles(128, 128)]
    assert tuner.best("product", "t64", candidates, multiply_in_blocks) == Tiles(128, 128)
    choice = tuner.table.choices["product"]["t64"]
    assert choice.microseconds > 0
    assert choice.skipped == {
        '{"m": 96, "n": 96}': "WrongResult: the product is not that of the reference",
    }


@pytest.mark.parametrize("error", [ct.TileTypeError("bad tile"), torch.OutOfMemoryError("too large"), WrongResult("x")])
def test_a_failing_candidate_is_never_chosen(error: Exception) -> None:
    def measure(candidate: int) -> float:
        if candidate == 1:
            raise error
        return float(candidate)

    tuner = Tuner(Table(), budget_s=60)
    assert tuner.best("k", "t1", [1, 3, 2], measure) == 2
    assert type(error).__name__ in tuner.table.choices["k"]["t1"].skipped["1"]


def test_where_nothing_works_the_first_candidate_is_returned_and_nothing_recorded() -> None:
    def measure(candidate: int) -> float:
        raise WrongResult("never right")

    tuner = Tuner(Table(), budget_s=60)
    assert tuner.best("k", "t1", [7, 8], measure) == 7
    assert not tuner.table.choices


@pytest.mark.parametrize("error", [KeyError("no such tensor"), torch.AcceleratorError("an illegal access")])
def test_a_bug_or_a_lost_device_is_not_taken_for_a_bad_candidate(error: Exception) -> None:
    def measure(candidate: int) -> float:
        raise error

    with pytest.raises(type(error)):
        Tuner(Table(), budget_s=60).best("k", "t1", [1], measure)


def test_what_the_table_knows_is_not_measured_again() -> None:
    table = Table()
    table.put("k", "t1", Choice(encode(Tiles(1, 2)), 3.0))
    calls: list[Tiles] = []

    def measure(candidate: Tiles) -> float:
        calls.append(candidate)
        return 1.0

    tuner = Tuner(table, budget_s=60)
    assert tuner.best("k", "t1", [Tiles(5, 5), Tiles(1, 2)], measure) == Tiles(1, 2)
    assert not calls
    assert tuner.best("k", "t1", [Tiles(5, 5)], measure) == Tiles(5, 5)  # the known one is no candidate any more
    assert calls == [Tiles(5, 5)]


def test_the_budget_ends_the_search_and_the_next_one_goes_on() -> None:
    now = 0.0

    def measure(candidate: int) -> float:
        nonlocal now
        now += 10
        return float(candidate)

    table = Table()
    assert Tuner(table, budget_s=15, clock=lambda: now).best("k", "t1", [3, 2, 1], measure) == 2
    assert BUDGET_SPENT in table.choices["k"]["t1"].skipped["1"]
    assert Tuner(table, budget_s=100, clock=lambda: now).best("k", "t1", [3, 2, 1], measure) == 1
    assert not table.choices["k"]["t1"].skipped


def test_a_configuration_survives_json() -> None:
    pair = Pair(Tiles(1, 2), Tiles(3, 4), threshold=8)
    assert decode(Pair, json.loads(json.dumps(encode(pair)))) == pair
    assert decode(int, encode(4)) == 4
    with pytest.raises(TypeError):
        decode(Tiles, {"m": 1, "k": 2})
    with pytest.raises(TypeError):
        decode(Tiles, 3)
    with pytest.raises(TypeError):
        decode(int, "3")


def test_the_cache_holds_only_for_the_machine_it_was_measured_on(tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "tune.json"
    other = replace(MACHINE, driver="590.0")
    table = Table()
    table.put("k", "t1", Choice(encode(Tiles(1, 2)), 3.0, {"x": "wrong"}))
    store_table(table, MACHINE, cache)
    store_table(Table(), other, cache)
    assert load_table(MACHINE, cache).get("k", "t1", Tiles) == Tiles(1, 2)
    assert load_table(MACHINE, cache).choices["k"]["t1"].skipped == {"x": "wrong"}
    for field in ("gpu", "driver", "cuda_tile", "tileiras", "sources"):
        assert load_table(replace(MACHINE, **{field: "another"}), cache).get("k", "t1", Tiles) is None
    assert list(cache.parent.iterdir()) == [cache]


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_broken_cache_is_left_out(tmp_path: Path, content: str) -> None:
    cache = tmp_path / "tune.json"
    cache.write_text(content)
    assert not load_table(MACHINE, cache).choices
    store_table(Table(), MACHINE, cache)
    assert json.loads(cache.read_text()) == {MACHINE.key: {}}


def test_a_shipped_table_serves_a_first_start_and_the_cache_overrides_it(tmp_path: Path) -> None:
    h200 = replace(MACHINE, gpu="NVIDIA H200")
    shipped = load_table(h200, tmp_path / "none.json")
    assert shipped.choices
    kernel, shapes = next(iter(shipped.choices.items()))
    shape_class = next(iter(shapes))
    local = Table()
    local.put(kernel, shape_class, Choice("mine", 1.0))
    store_table(local, h200, tmp_path / "tune.json")
    loaded = load_table(h200, tmp_path / "tune.json")
    assert loaded.choices[kernel][shape_class].config == "mine"
    assert loaded.choices.keys() == shipped.choices.keys()


def test_the_source_hash_follows_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = source_hash(tmp_path)
    (tmp_path / "notes.md").write_text("no source")
    assert source_hash(tmp_path) == first
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    renamed = source_hash(tmp_path)
    (tmp_path / "b.py").write_text("x = 2\n")
    assert len({first, renamed, source_hash(tmp_path)}) == 3
