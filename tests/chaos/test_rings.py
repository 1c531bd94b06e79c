"""Callers that write whatever they like into shared memory, for long: the engine and an honest caller beside them."""

import os
import secrets

from tests.chaos.scale import scaled
from tests.native.lane.programs import hostile, run

SEED = os.environ.get("EXPERTD_FUZZ_SEED") or str(secrets.randbits(32))
SECONDS = scaled(600, 5)


def test_hostile_callers_harm_nobody_for_long() -> None:
    # What fails prints its seed: EXPERTD_FUZZ_SEED replays what was written, if not how the threads took turns.
    print(f"\nfuzz rings: {run(hostile(), str(SECONDS), SEED, seconds=SECONDS + 120).strip()}")
