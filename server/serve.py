"""`expertd serve`."""

from __future__ import annotations

import argparse
import logging
import resource
import sys

import torch
import uvloop
from prometheus_client import disable_created_metrics

from expertd.kernels.model.config import InvalidConfig
from expertd.kernels.numerics.backend import UnsupportedShape
from expertd.kernels.weights.checkpoint import CheckpointError
from expertd.proto.base.garbage import spared_imports
from expertd.proto.base.malloc import keep_freed_memory
from expertd.server.assembly import assemble
from expertd.server.options.config import InvalidOption, ServerConfig
from expertd.server.scheduling.neighbours import CpuShare, announced
from expertd.server.scheduling.selfcheck import SelfCheckFailed
from expertd.server.scheduling.watchdog import DeviceLost
from expertd.server.telemetry.log_writer import LogWriter
from expertd.server.telemetry.logs import configure_logging
from expertd.server.telemetry.metrics import Metrics
from expertd.server.telemetry.tracing import RequestTracer, make_provider

log = logging.getLogger(__name__)
ENOUGH_FILES = 1 << 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ServerConfig.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """0 after a drained stop, 2 for options or a checkpoint that cannot be used, 1 for a device that failed."""
    try:
        config = ServerConfig.from_arguments(arguments)
    except (InvalidConfig, InvalidOption) as error:
        print(f"expertd serve: error: {error}", file=sys.stderr)
        return 2
    _allow_files()
    writer = configure_logging(config.log_level, config.log_format)
    keep_freed_memory()
    try:
        with announced(), spared_imports():
            _serve(config, writer)
    except (InvalidOption, InvalidConfig, CheckpointError, UnsupportedShape, SelfCheckFailed, DeviceLost) as error:
        if config.log_format == "json":
            log.critical("%s", error)
        else:
            writer.say(f"expertd serve: error: {error}")
        return 1 if isinstance(error, SelfCheckFailed | DeviceLost) else 2
    return 0


def _allow_files() -> None:
    """As many as there may be: every connection is one, and with the last one nothing can be opened, health neither."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _serve(config: ServerConfig, writer: LogWriter) -> None:
    """Run one server in this process until it is told to stop."""
    share = CpuShare.of_now(config.threads)
    torch.set_num_threads(share.threads)
    # A second series beside every counter and histogram, which says when it began, is more than it is worth.
    disable_created_metrics()  # type: ignore[no-untyped-call]
    provider = make_provider(config)
    tracer = None if provider is None else RequestTracer(provider)
    metrics = Metrics()
    metrics.log_lines_dropped.set_function(lambda: [((), (writer.dropped,))])

    async def main() -> None:
        server = assemble(config, metrics, tracer)
        log.info("%s", share)
        await server.run()

    try:
        uvloop.run(main())
    finally:
        if provider is not None:
            provider.shutdown()
