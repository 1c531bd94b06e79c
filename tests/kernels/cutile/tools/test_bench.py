"""`expertd bench kernels`, as far as no GPU is needed: what it writes, what it refuses, and peers by a stand-in."""

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from expertd.cli import main
from expertd.kernels.cutile.base.shape import ExpertShape
from expertd.kernels.cutile.pipeline.toolchain import Toolchain
from expertd.kernels.cutile.tools import bench, peers
from expertd.kernels.cutile.tools.inputs import random_batch, random_weights
from expertd.kernels.numerics.backend import LayerWeights, TokenBatch
from expertd.kernels.oracle.reference import reference_partials
from expertd.kernels.weights.files import check_writable, write_json

CPU = torch.device("cpu")
SHAPE = ExpertShape(4, 256, 128)
ROW = bench.Row("uniform", 64, 40, 4, 354.0, 360.5, 700.0, float("nan"), 318.0, 0.02)
DEEP_GEMM = next(peer for peer in peers.PEERS if peer.name == "DeepGEMM")


def batch_of(tokens: int) -> TokenBatch:
    return random_batch(SHAPE, tokens, CPU, torch.Generator().manual_seed(1), model_experts=8, top_k=2)


def weights() -> LayerWeights:
    return random_weights(SHAPE, CPU, torch.Generator().manual_seed(2))


def once(work: Callable[[LayerWeights], object], layers: Sequence[LayerWeights]) -> float:
    """A timer that only does the work."""
    for layer in layers:
        work(layer)
    return 17.0


def dequantized(values: Tensor, scales: Tensor, rows: int) -> Tensor:
    return values.float() * scales.repeat_interleave(rows, -2).repeat_interleave(128, -1)


def test_the_file_has_the_machine_its_compiler_the_rows_and_the_peers(tmp_path: Path) -> None:
    other = bench.PeerRow("vLLM", "0.1", peers.LAYER, "uniform", 64, 400.0, 354.0, 0.03)
    write_json(bench.as_json("NVIDIA X", 4.4e12, 789e12, [ROW], [other]), tmp_path / "kernels.json")
    found = json.loads((tmp_path / "kernels.json").read_text())
    toolchain = Toolchain.detect()
    assert (found["gpu"], found["cuda_tile"], found["tileiras"]) == (
        "NVIDIA X",
        toolchain.cuda_tile,
        toolchain.tileiras,
    )
    assert (found["read_bytes_per_s"], found["bf16_flops_per_s"]) == (4.4e12, 789e12)
    (row,), (peer,) = found["rows"], found["peers"]
    assert (row["routing"], row["tokens"], row["fast"], row["fast_invariant"]) == ("uniform", 64, 354.0, 360.5)
    assert math.isnan(row["torch"])
    assert (peer["peer"], peer["time"], peer["fast"]) == ("vLLM", 400.0, 354.0)


@pytest.mark.parametrize(("name", "reason"), [("file/kernels.json", "exists"), ("", "Is a directory")])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, name: str, reason: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("the GPU was asked for first"))
    assert main(["bench", "kernels", "--json", str(tmp_path / name)]) == 1
    told = capsys.readouterr().err
    assert f"expertd bench kernels: --json {tmp_path / name} cannot be written: " in told
    assert reason in told


def test_a_check_leaves_no_file_behind(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "kernels.json")
    assert list((tmp_path / "new").iterdir()) == []


def test_peers_that_are_missing_are_named() -> None:
    said: list[str] = []
    absent = replace(DEEP_GEMM, name="Absent", module="expertd_absent_peer")
    assert peers.installed([absent], said.append) == []
    assert said == ["Absent is left out: No module named 'expertd_absent_peer'"]


class DeepGemm(ModuleType):
    """Both products by torch, as DeepGEMM defines them."""

    def __init__(self) -> None:
        super().__init__("deep_gemm")
        self.products: list[tuple[Tensor, Tensor]] = []

    def m_grouped_fp8_gemm_nt_contiguous(
        self, rows: tuple[Tensor, Tensor], matrices: tuple[Tensor, Tensor], out: Tensor, owners: Tensor
    ) -> None:
        left, right = dequantized(*rows, 1), dequantized(*matrices, 128)
        assert len(left) % 128 == 0
        assert (owners.view(-1, 128) == owners.view(-1, 128)[:, :1]).all(), "a tile of 128 rows is one expert's"
        out.copy_(torch.einsum("rk,rnk->rn", left, right[owners.long()]))
        self.products.append((out, owners))


def test_a_stand_in_for_deep_gemm_gets_what_it_is_defined_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in, batch, layer = DeepGemm(), batch_of(3), weights()
    monkeypatch.setitem(sys.modules, "deep_gemm", stand_in)
    ((peer, module),) = peers.installed([DEEP_GEMM], pytest.fail)
    row = bench.timed_peer(peer, module, ROW, batch, [layer], once)
    assert (row.peer, row.routing, row.tokens, row.time, row.fast) == ("DeepGEMM", "uniform", 64, 17.0, 354.0)
    assert math.isnan(row.error)
    first, owners = stand_in.products[-2]
    assert {tuple(out.shape[1:]) for out, _ in stand_in.products} == {(256,), (256,)}
    tokens = peers.unquantized(batch).float()
    for expert in range(SHAPE.num_experts):
        chosen = (batch.expert_ids == expert).any(dim=1)
        matrix = dequantized(layer.up_gate[expert], layer.up_gate_scales[expert], 128)
        found = first[owners == expert][: int(chosen.sum())].float()
        torch.testing.assert_close(found, tokens[chosen] @ matrix.T, rtol=0.02, atol=0.02)


def test_a_whole_layer_is_compared_with_the_reference() -> None:
    layer, batch = weights(), batch_of(5)
    sums = reference_partials(batch, bench.gate_first(layer), torch.float32)
    peer = replace(DEEP_GEMM, prepare=lambda module, batch, layer: lambda weights: sums)
    assert bench.timed_peer(peer, ModuleType("any"), ROW, batch, [layer], once).error == 0
    halves = layer.up_gate.float().chunk(2, dim=1)
    assert bench.gate_first(layer).up_gate.float().equal(torch.cat(halves[::-1], dim=1))
    wrong = replace(peer, prepare=lambda module, batch, layer: lambda weights: 2 * sums)
    assert bench.timed_peer(wrong, ModuleType("any"), ROW, batch, [layer], once).error == pytest.approx(1)


def test_a_peer_that_fails_is_told_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    row = bench.timed_peer(DEEP_GEMM, ModuleType("deep_gemm"), ROW, batch_of(2), [weights()], once)
    assert math.isnan(row.time)
    assert "DeepGEMM unknown failed at 64 tokens: AttributeError" in capsys.readouterr().err
    bench.print_peers([row])
    assert "| DeepGEMM unknown | both products of sorted rows alone | uniform | 64 | nan | 354.0 | nan |" in (
        capsys.readouterr().out
    )
