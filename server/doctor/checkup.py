"""`expertd doctor`: would `expertd serve` with the same options work on this machine, and if not, what to do."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

from expertd.kernels.model.config import InvalidConfig
from expertd.kernels.weights.checkpoint import Checkpoint, CheckpointError
from expertd.kernels.weights.experts import layer_bytes
from expertd.kernels.weights.ledger import Ledger
from expertd.proto.base.loopback import UNIX
from expertd.server.doctor.finding import Finding, fail, ok
from expertd.server.doctor.gpu import check_gpu, gpu_memory
from expertd.server.doctor.host import (
    available_memory,
    check_cpus,
    check_limits,
    check_memory,
    check_native,
    check_ports,
    check_shared_memory,
)
from expertd.server.doctor.model import describe_model
from expertd.server.doctor.peers import check_certificates, check_peer
from expertd.server.doctor.sharing import check_sharing
from expertd.server.options.config import Address, InvalidOption, ServerConfig
from expertd.server.scheduling.neighbours import CpuShare
from expertd.server.scheduling.shard import WEIGHT_DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ServerConfig.add_arguments(parser, model_required=False)
    parser.add_argument("--peers", nargs="+", default=[], metavar="ADDRESS", help="other servers to reach")
    parser.add_argument(
        "--peer-ca",
        type=Path,
        metavar="CA",
        help="PEM file of authorities of peers' certificates (default: --tls-client-ca)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of {level, check, text}")


def run(arguments: argparse.Namespace) -> int:
    """0 without failures, 1 with some, 2 for options that contradict each other."""
    try:
        has_model = arguments.model is not None
        if arguments.experts is None and arguments.shard is None:
            arguments.experts = "all" if has_model else "0"
        arguments.model = arguments.model or "."
        config = ServerConfig.from_arguments(arguments)
        for peer in arguments.peers:
            _check_peer(peer)
    except (InvalidConfig, InvalidOption) as error:
        print(f"expertd doctor: error: {error}", file=sys.stderr)
        return 2
    findings = []
    for finding in examine(config, arguments.peers, arguments.peer_ca, has_model=has_model):
        findings.append(finding)
        if not arguments.json:
            print(f"{finding.level:5} {finding.check:14} {finding.text}", flush=True)
    if arguments.json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    return 1 if any(finding.level == "fail" for finding in findings) else 0


def _check_peer(address: str) -> None:
    try:
        if not address.startswith(UNIX):
            Address.parse(address)
    except ValueError as error:
        raise InvalidOption(f"--peers: {error}") from None


def examine(
    config: ServerConfig, peers: list[str], peer_ca: Path | None, *, has_model: bool = True
) -> Iterator[Finding]:
    """Every check, each as soon as it is done."""
    yield from check_gpu(config)
    yield from check_sharing(config)
    fingerprint = None
    if has_model:
        fingerprint = yield from _check_model(config)
    else:
        yield ok("checkpoint", "none to look at: give --model, and --experts or --shard")
    yield from check_ports(config)
    yield check_native()
    yield check_limits()
    yield check_cpus(CpuShare.of_now(config.threads, announced=False))
    yield check_shared_memory()
    yield from check_certificates(config)
    for peer in peers:
        yield check_peer(peer, config, peer_ca, fingerprint)


def _check_model(config: ServerConfig) -> Generator[Finding, None, str | None]:
    """Whether it can be read and has room here; its fingerprint."""
    try:
        with Checkpoint(config.model) as checkpoint:
            yield describe_model(checkpoint, config.weights)
            ledger = Ledger(checkpoint, config.manifest)
            yield _check_checkpoint(checkpoint, ledger, config)
            yield from check_memory(config, checkpoint.config, available_memory(), gpu_memory(config))
            return ledger.fingerprint
    except (CheckpointError, InvalidConfig) as error:
        yield fail("checkpoint", str(error))
    return None


def _check_checkpoint(checkpoint: Checkpoint, ledger: Ledger, config: ServerConfig) -> Finding:
    """All tensors that will be read, by their headers. Raises `CheckpointError`."""
    layers = config.layers or checkpoint.config.moe_layers
    outside = set(layers) - set(checkpoint.config.moe_layers)
    if outside:
        return fail("checkpoint", f"--layers names layer {min(outside)}, which is no MoE layer of {config.model}")
    if config.experts[-1] >= checkpoint.config.n_routed_experts:
        last = checkpoint.config.n_routed_experts - 1
        return fail("checkpoint", f"--experts names expert {config.experts[-1]}; the model's experts are 0-{last}")
    dtype = WEIGHT_DTYPES[config.weights]
    size = sum(layer_bytes(checkpoint, layer, config.experts, dtype) for layer in layers)
    return ok("checkpoint", f"{config.model}: {size / 1e9:.2f} GB to read, model {ledger}")
