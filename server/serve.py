"""`expertd serve`."""

from __future__ import annotations

import argparse
import logging
import sys

from expertd.kernels.backend import UnsupportedShape
from expertd.kernels.checkpoint import CheckpointError
from expertd.kernels.config import InvalidConfig
from expertd.server.app import serve
from expertd.server.config import InvalidOption, ServerConfig
from expertd.server.selfcheck import SelfCheckFailed
from expertd.server.watchdog import DeviceLost


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ServerConfig.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """0 after a drained stop, 2 for options or a checkpoint that cannot be used, 1 for a device that failed."""
    try:
        config = ServerConfig.from_arguments(arguments)
        logging.basicConfig(
            level=config.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
        )
        serve(config)
    except (InvalidOption, InvalidConfig, CheckpointError, UnsupportedShape) as error:
        print(f"expertd serve: error: {error}", file=sys.stderr)
        return 2
    except (SelfCheckFailed, DeviceLost) as error:
        print(f"expertd serve: error: {error}", file=sys.stderr)
        return 1
    return 0
