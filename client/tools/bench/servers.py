"""The servers that `expertd bench serve` measures, its own or others, and coordinators over every transport to them."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.fleet.ports import grpc_addresses
from expertd.client.sync import SyncCoordinator
from expertd.client.tools.bench.options import TOKENS, TRANSPORTS, BenchError, measures_calls, sections_of
from expertd.client.tools.cluster import LocalCluster, even_shards
from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.files import cache_folder
from expertd.proto.base.errors import ExpertdError

LOCAL_EXPERTS = 32
STREAM_SECONDS = 5.0
"""What a stream-ordered call may take, on machines that do other things, too."""


@dataclass(frozen=True, slots=True)
class Way:
    """One transport to all servers."""

    transport: str
    addresses: Sequence[str]
    moe: Coordinator
    most_tokens: int | None = None
    """Of one stream-ordered call; None for other transports, which cut batches."""

    @property
    def device(self) -> torch.device:
        """Where a caller has its tensors."""
        return torch.device("cuda" if self.transport in ("cuda", "stream") else "cpu")

    def blocking(self) -> SyncCoordinator:
        """Another coordinator of the same settings, not connected yet."""
        return SyncCoordinator(self.addresses, self.moe.config)

    def settle(self) -> None:
        """Wait for what the caller's GPU was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()


async def addresses_of(stack: contextlib.AsyncExitStack, arguments: argparse.Namespace) -> Mapping[str, Sequence[str]]:
    """Of the servers, which are started if they are its own, by transport. Raises `BenchError` for too many."""
    transports = [one for one in TRANSPORTS if one != "stream" or measures_calls(arguments)]
    several = arguments.servers_of_its_own is not None
    if arguments.servers is not None or several:
        transports.remove("unix")
    if arguments.servers is not None:
        return dict.fromkeys(transports, await grpc_addresses(arguments.servers))
    unix = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertd-"))) / "socket"
    cluster = await stack.enter_async_context(_own_servers(arguments, [] if several else ["--unix-socket", str(unix)]))
    found: dict[str, Sequence[str]] = dict.fromkeys(transports, cluster.addresses)
    return found if several else found | {"unix": [f"unix:{unix}"]}


async def connect(
    stack: contextlib.AsyncExitStack,
    addresses: Mapping[str, Sequence[str]],
    transports: Sequence[str] | None,
    config: CoordinatorConfig,
    tokens: int,
) -> list[Way]:
    """The ways to measure calls of up to so many tokens: `transports`, or all that there are.

    Raises `BenchError` for one that cannot be had.
    """
    ways = []
    for transport in transports or addresses:
        if transport not in addresses:
            raise BenchError("--transport unix is of its own server; give --servers unix:PATH with --transport grpc")
        chosen = config if transport in ("shm", "cuda", "stream") else replace(config, shared_memory_bytes=0)
        moe = await stack.enter_async_context(Coordinator(addresses[transport], chosen))
        most = await _most_tokens(moe, tokens) if transport == "stream" else None
        obstacle = await _obstacle(moe, transport, len(addresses[transport]), most)
        if obstacle is None:
            ways.append(Way(transport, addresses[transport], moe, most))
        elif transports is not None:
            raise BenchError(f"--transport {transport}: {obstacle}")
    return ways


def bench_model(hidden_size: int, intermediate_size: int) -> DemoModel:
    """A layer with 32 experts, of which every token needs one: the share of a server among eight."""
    return DemoModel(
        hidden_size=hidden_size,
        moe_intermediate_size=intermediate_size,
        n_routed_experts=LOCAL_EXPERTS,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        moe_layers=1,
    )


def _own_servers(arguments: argparse.Namespace, options: Sequence[str]) -> LocalCluster:
    """Servers that share all experts of the model that is measured."""
    folder = arguments.model or write_demo_checkpoint(cache_folder() / "bench", _own_model(arguments))
    with Checkpoint(folder) as checkpoint:
        model = checkpoint.config
    count = arguments.servers_of_its_own or 1
    try:
        shards = even_shards(model.n_routed_experts, count)
    except ValueError as error:
        raise BenchError(f"--servers-of-its-own {count}: {error}") from error
    if model.n_routed_experts // count < model.num_experts_per_tok:
        raise BenchError(
            f"--servers-of-its-own {count}: one has fewer experts than a token's {model.num_experts_per_tok}"
        )
    if "stream" in (arguments.transport or ()):
        # These calls are not cut.
        largest = min(16384, max(arguments.tokens or TOKENS))
        options = [*options, "--max-tokens-per-request", str(max(4096, largest))]
    if arguments.devices is not None:
        options = [*options, "--devices", arguments.devices]
    # On the CPU one core is left to the coordinator.
    threads = max(1, ((os.cpu_count() or 2) - 1) // count)
    return LocalCluster(folder, shards, ["--backend", arguments.backend, "--threads", str(threads), *options])


def _own_model(arguments: argparse.Namespace) -> DemoModel:
    hidden, inner = arguments.hidden_size, arguments.intermediate_size
    if sections_of(arguments):
        demo = DemoModel()
        return replace(
            demo, hidden_size=hidden or demo.hidden_size, moe_intermediate_size=inner or demo.moe_intermediate_size
        )
    return bench_model(hidden or 7168, inner or 2048)


async def _most_tokens(moe: Coordinator, wanted: int) -> int:
    """What all servers take in one request, of what is wanted."""
    shards = [await transport.get_shard(moe.config.connect_timeout) for transport in moe.transports]
    return min(wanted, *(shard.max_tokens_per_request for shard in shards))


async def _obstacle(moe: Coordinator, transport: str, servers: int, most_tokens: int | None) -> str | None:
    """Why a transport cannot be measured; stream-ordered calls are prepared."""
    if transport == "shm" and len(moe.sharing_memory) < servers:
        return "a server shares no memory with this process; see the log for why"
    if transport in ("cuda", "stream") and not torch.cuda.is_available():
        return "torch sees no GPU here"
    if transport == "cuda":
        # One token for every expert, so that every server is called.
        experts = torch.arange(moe.model.n_routed_experts).unsqueeze(1)
        hidden = torch.zeros(len(experts), moe.model.hidden_size, device="cuda")
        await moe(moe.layers[0], hidden, topk_ids=experts, topk_weights=torch.ones(experts.shape))
        if len(moe.sharing_gpu_memory) < servers:
            return "a server shares no memory of this process's GPU; see the log for why"
    if most_tokens is not None:
        try:
            await moe.prepare_stream(most_tokens, "cuda", timeout=STREAM_SECONDS)
        except ExpertdError as error:
            return str(error)
    return None
