"""`expertd plan`: files in, table and file out; the simulation."""

import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from expertd.cli import main
from expertd.client.placement.assignment import Fleet, Placement
from expertd.client.placement.simulate import FLEETS, Simulation, bytes_per_visit, fan_out, plot, simulate
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.model.ranges import parse_ranges

LOADS = {"4": [1, 1, 1, 1, 1, 1, 1, 9], "3": [9, 1, 1, 1, 1, 1, 1, 1]}


def write(folder: Path, name: str, content: object) -> str:
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def test_a_plan_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slots = (3, 4, 5)
    fleet = [{"name": f"node{index}:50051", "slots": count} for index, count in enumerate(slots)]
    output = tmp_path / "plan.json"
    command = ["plan", "--loads", write(tmp_path, "loads.json", LOADS), "--output", str(output)]
    command += ["--fleet", write(tmp_path, "fleet.json", fleet)]
    assert main([*command, "--same-in-all-layers"]) == 0
    plan = json.loads(output.read_text())
    experts = [parse_ranges(server["experts"]) for server in plan["servers"]]
    assert set().union(*experts) == set(range(8))
    assert sum(0 in mine for mine in experts) > 1 < sum(7 in mine for mine in experts)
    assert all(len(mine) <= count for mine, count in zip(experts, slots, strict=True))
    assert [server["name"] for server in plan["servers"]] == ["node0:50051", "node1:50051", "node2:50051"]
    assert np.mean([server["expected_load"] for server in plan["servers"]]) == pytest.approx(1)
    assert list(plan["balancedness_by_layer"]) == ["3", "4"]
    printed = capsys.readouterr().out
    assert plan["servers"][0]["experts"] in printed
    assert f"{plan['balancedness']:.4f}" in printed
    assert main(command) == 0
    by_layer = json.loads(output.read_text())
    assert by_layer["balancedness"] >= plan["balancedness"]
    for layer, hot, quiet in (("3", 0, 7), ("4", 7, 0)):
        lists = [parse_ranges(server["experts_by_layer"][layer]) for server in by_layer["servers"]]
        assert set().union(*lists) == set(range(8))
        assert sum(hot in one for one in lists) > 1 == sum(quiet in one for one in lists)
    assert "over all layers" in capsys.readouterr().out


def test_servers_of_several_devices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, saved = tmp_path / "plan.json", tmp_path / "saved.json"
    command = ["plan", "--loads", write(tmp_path, "loads.json", LOADS), "--servers", "2", "--slots", "6"]
    assert main([*command, "--devices", "2", "--output", str(output), "--save-loads", str(saved)]) == 0
    assert json.loads(saved.read_text()) == LOADS
    plan = json.loads(output.read_text())
    loads = [server["expected_device_loads"] for server in plan["servers"]]
    assert [len(its) for its in loads] == [2, 2]
    assert (
        np.mean(loads) == pytest.approx(1) == pytest.approx(np.mean([one["expected_load"] for one in plan["servers"]]))
    )
    assert plan["balancedness"] <= 1 / np.max(loads) + 1e-9
    assert "each of a server's 2 devices has room for 3 experts of a layer" in capsys.readouterr().out
    assert main([*command, "--devices", "4"]) == 2
    assert "devices is 4; it must divide the slots of every server, such as 6" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("loads", "options", "message"),
    [
        ({"3": [1, 2]}, [], "give --loads and either --fleet or --servers"),
        ({"3": [1, 2], "4": [1]}, ["--servers", "2"], "one list of numbers for each layer"),
        ({"3": [1, "2"]}, ["--servers", "2"], "one list of numbers for each layer"),
        ([1, 2], ["--servers", "2"], "must hold a JSON object from layers"),
        ({"3": [1, 2]}, ["--servers", "2", "--simulate"], "--simulate has loads and fleets of its own"),
        ({"3": [1, 2]}, ["--servers", "2", "--plot", "x.png"], "give --simulate with it"),
        ({"3": [0, 0], "4": [0, 0]}, ["--servers", "2"], "no traffic at all"),
        ({"3": [1] * 65}, ["--servers", "2"], "the fleet has 64 slots for 65 experts"),
    ],
)
def test_unusable_input_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], loads: object, options: list[str], message: str
) -> None:
    assert main(["plan", "--loads", write(tmp_path, "loads.json", loads), *options]) == 2
    assert message in capsys.readouterr().err


def test_ten_thousand_servers_are_simulated_within_a_minute() -> None:
    started = time.perf_counter()
    simulations = list(simulate(MoeConfig(), slots=32, zipf=1.0))
    assert time.perf_counter() - started < 60
    assert {one.servers for one in simulations} == set(FLEETS)
    by_policy = {one.policy: one for one in simulations if one.servers == 10_000}
    # A server that holds a whole group is enough for it, and a token goes to 4 groups.
    assert by_policy["hierarchical"].fan_out <= 4 < by_policy["global"].fan_out
    assert all(one.balancedness > 0.9 for one in by_policy.values())


def test_fan_out_counts_distinct_servers_and_bytes_follow_it() -> None:
    placement = Placement(np.array([[True, True, False], [True, False, True]]), "global")
    assert fan_out(placement, np.array([[1, 2], [1, 1]])) == 1.5
    assert bytes_per_visit(MoeConfig()) == 7168 + 56 * 4 + 8 * 8 + 7168 * 2


def test_a_plot_is_drawn_or_its_library_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = Simulation(servers=8, policy="global", balancedness=1.0, fan_out=4.0, bytes_per_token=1e5)
    plot([one], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'expertd\[plot\]'"):
        plot([one], tmp_path / "plot.png")


def test_uniform_fleets_are_in_order() -> None:
    assert Fleet.uniform(4, 2, 2).nodes == (0, 0, 1, 1)
