"""Faults composed at random, seed by seed.

    python -m tests.chaos.composed.run --seeds 0 100 --histories /tmp/histories

prints a line for each seed and one for all; exit code 1 after a violation. `--seeds 17 18` replays the faults of 17.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import math
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from tests.chaos.composed.schedule import draw
from tests.chaos.composed.stage import Models
from tests.chaos.composed.totals import Totals
from tests.chaos.composed.trial import Trial
from tests.chaos.fleet import FORKS, PRELOADED

SHAPE = DemoModel(
    hidden_size=256, moe_intermediate_size=128, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2
)


def make_models(folder: Path) -> Models:
    """Two of one shape with different weights."""
    return Models(*(write_demo_checkpoint(folder, replace(SHAPE, seed=seed)) for seed in (0, 1)))


async def run_seed(seed: int, models: Models, histories: Path, totals: Totals) -> list[str]:
    """The violations of one seed, whose history is then kept in `histories`."""
    trial = Trial(draw(seed), models)
    history = await trial.run()
    totals.add(history, trial.strikes)
    one = Totals()
    one.add(history, trial.strikes)
    print(f"seed {seed}: {one.line()}", flush=True)
    violations = history.violations()
    if violations:
        histories.mkdir(parents=True, exist_ok=True)
        history.write(histories / f"{seed}.jsonl")
    return violations


async def _main(arguments: argparse.Namespace) -> int:
    torch.set_num_threads(1)
    # Servers are forked from a process that has what this module imports: multiprocessing has each import it again.
    FORKS.set_forkserver_preload([*PRELOADED, "tests.chaos.composed.trial"])
    totals = Totals()
    with tempfile.TemporaryDirectory(prefix="expertd-models-") as folder:
        models = make_models(Path(folder))
        latest = time.monotonic() + arguments.seconds
        for seed in itertools.takewhile(lambda _: time.monotonic() < latest, range(*arguments.seeds)):
            for violation in await run_seed(seed, models, arguments.histories, totals):
                print(f"  violation: {violation}", flush=True)
    print(f"{totals.line()}\n{totals.kinds()}")
    return 1 if totals.violations else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs=2, type=int, required=True, metavar=("FIRST", "END"))
    parser.add_argument("--seconds", type=float, default=math.inf, help="after which no further seed is begun")
    parser.add_argument("--histories", type=Path, default=Path(tempfile.gettempdir()) / "expertd-histories")
    sys.exit(asyncio.run(_main(parser.parse_args())))
