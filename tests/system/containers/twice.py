"""The client's image built twice from nothing: whether its layers have the same digests.

    python -m tests.system.containers.twice

takes minutes: exit code 1 with the layers that differ.
"""

import json
import sys
import time
from pathlib import Path

from expertd.kernels.weights.files import cache_folder
from tests.system.containers.docker_engine import ROOT, Engine, check_programs
from tests.system.containers.images import BASE, arguments

TAG = "expertd-client:twice"


def layers(engine: Engine, context: Path) -> list[str]:
    """Digests of the layers of an image that is built without a cache."""
    started = time.monotonic()
    engine.build(context, TAG, "--no-cache", "--target", "client", *arguments())
    found: list[str] = json.loads(engine.docker("image", "inspect", "--format={{json .RootFS.Layers}}", TAG))
    print(f"{time.monotonic() - started:.0f} s", *found, sep="\n")
    return found


def main() -> int:
    check_programs()
    engine = Engine(cache_folder() / "image-test")
    with engine.alone(), engine.running(bridged=False):
        engine.base_image(BASE)
        first, second = layers(engine, ROOT), layers(engine, ROOT)
        engine.docker("image", "rm", TAG)
    differing = [index for index, pair in enumerate(zip(first, second, strict=True)) if len(set(pair)) == 2]
    print(f"layers that differ: {differing}" if differing else "all layers are equal")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
