"""What a server is made of."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial

import grpc.aio
import torch
from grpc_reflection.v1alpha import reflection
from rich.console import Console

from expertd._native import Engine, limit_spin
from expertd.kernels.memory.gpu import gpu_uuid
from expertd.kernels.model.ranges import describe_experts
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.ledger import Ledger
from expertd.proto import codec
from expertd.server.admin import counting
from expertd.server.admin.holdings import Holdings
from expertd.server.admin.service import AdminDoor
from expertd.server.app import Server
from expertd.server.failpoints import failpoints_from_environment
from expertd.server.hardware.gpu_health import GpuHealth
from expertd.server.hardware.nvml import load_nvml
from expertd.server.local.door import LocalDoor
from expertd.server.local.gpu import Cuda, Gpu
from expertd.server.local.handover import handover_socket
from expertd.server.options.config import Address, ServerConfig
from expertd.server.options.ports import obstacle_to_bind
from expertd.server.rpc.description import describe, owning
from expertd.server.rpc.door import GrpcDoor
from expertd.server.rpc.execution import ExecuteHandlers
from expertd.server.rpc.executor import EngineExecutor
from expertd.server.rpc.handlers import ExpertShardHandlers
from expertd.server.rpc.health import SERVICE as HEALTH
from expertd.server.rpc.health import Health
from expertd.server.rpc.limits import SmallMessages, check_largest_request, server_options
from expertd.server.rpc.security import ServerSecurity
from expertd.server.rpc.tickets import Tickets
from expertd.server.rpc.verifier import Verifier
from expertd.server.scheduling import devices, gpu_watch
from expertd.server.scheduling.backends import Choose, choose_backend, choose_devices, read_loads
from expertd.server.scheduling.generations import Generation, Generations
from expertd.server.scheduling.gpu_watch import GpuWatch
from expertd.server.scheduling.node import Device, Node
from expertd.server.scheduling.shadow import ShadowCheck
from expertd.server.scheduling.shard import WEIGHT_DTYPES, Shard, owned_layers
from expertd.server.scheduling.watchdog import Watchdog
from expertd.server.telemetry.journal import Journal, make_tally
from expertd.server.telemetry.loads import ExpertLoads
from expertd.server.telemetry.metrics import Metrics
from expertd.server.telemetry.pages import Pages
from expertd.server.telemetry.ready_file import ReadyFile
from expertd.server.telemetry.rpc_counter import RpcCounter
from expertd.server.telemetry.status import Status, build_of, placement_of
from expertd.server.telemetry.tracing import RequestTracer

log = logging.getLogger(__name__)
SERVICES = (codec.SERVICE, HEALTH, reflection.SERVICE_NAME)


def gpu_health_of(device: Device) -> GpuHealth | None:
    """Of a GPU that computes; a server without one says nothing of any."""
    if device.backend.name != "cutile":
        return None
    return GpuHealth.open(load_nvml(), gpu_uuid(torch.device("cuda", device.number)))


def assemble(
    config: ServerConfig,
    metrics: Metrics,
    tracer: RequestTracer | None = None,
    choose: Choose = choose_backend,
    open_gpu: Callable[[Device], GpuHealth | None] = gpu_health_of,
) -> Server:
    """A server, ready to `run`. Opens the checkpoint; raises `InvalidOption`, `InvalidConfig` or `CheckpointError`."""
    ready_file = ReadyFile(config.ready_file)
    security = ServerSecurity(config, metrics.security_file_errors.inc)
    metrics.certificates.set_function(security.certificate_ends)
    checkpoint = Checkpoint(config.model)
    check_largest_request(config, checkpoint.config)
    with Console(stderr=True).status("looking at the checkpoint"):
        ledger = Ledger(checkpoint, config.manifest)
    shard = Shard(
        config=checkpoint.config,
        model_fingerprint=ledger.fingerprint,
        placement_epoch=time.time_ns() // 1000,
        experts=owned_layers(checkpoint.config, config),
        weight_dtype=WEIGHT_DTYPES[config.weights],
    )
    backends, reason = choose_devices(config, checkpoint.config, choose)
    most = max(map(len, shard.experts.values()))
    node = Node(backends, most, config.device_experts, read_loads(config.device_loads, checkpoint.config))
    backend = node.devices[0].backend
    generations = Generations(Generation(shard, checkpoint, ledger))
    info = describe(config, generations.serving, node, reason)
    health = Health()
    loads = ExpertLoads(checkpoint.config.moe_layers, checkpoint.config.n_routed_experts)
    loads.owned = shard.experts
    tally = make_tally(loads)
    if config.spin_us is not None:
        limit_spin(config.spin_us)
    engine = Engine(
        shard.placement(config.max_tokens_per_request),
        tally=tally,
        max_batch_tokens=config.max_batch_tokens,
        max_queued_tokens=config.max_queued_tokens,
        max_queued_bytes=config.max_queued_bytes,
        spin_us=config.spin_us,
    )
    failpoints = failpoints_from_environment()
    if failpoints is not None:
        engine.use_failpoints(failpoints)
    executor = EngineExecutor(engine, info)

    def abandon(reason: str) -> None:
        # First: who is answered may use again what the device may still write to.
        for door in doors:
            door.disconnect()
        executor.abandon(reason)

    def set_serving(serving: bool) -> None:
        health.set_serving(serving)
        ready_file.tell(serving)

    def lose(device: Device, reason: str, hangs: bool) -> None:
        log.error("device %d is lost (%s): its experts are left to others", device.number, reason)
        holdings.lose(device, reason, hangs=hangs)
        log.warning("epoch %d: owning %s", holdings.epoch, describe_experts(executor.info.experts))

    watchdog = Watchdog(node, engine, config.device_timeout, abandon, set_serving, lose)
    gpu_watches = {
        device.number: GpuWatch(device.number, gpu, metrics, partial(watchdog.condemn_device, device))
        for device in node.devices
        if (gpu := open_gpu(device)) is not None
    }
    if gpu_watches:
        gpu_watch.export(metrics, gpu_watches)
    devices.export(metrics, node, tally)
    journal = Journal(metrics, tally, loads, tracer)
    rate = config.shadow_check_rate
    shadow = (
        ShadowCheck(lambda *place: holdings.generations.read(*place), backend.name, rate, metrics) if rate else None
    )
    if shadow is not None:
        engine.sample(shadow.sampler)
    verifier = Verifier(generations, executor, config.max_tokens_per_request)
    execution = ExecuteHandlers(executor, info.max_queued_bytes, security.identities)

    cuda = Cuda(torch.device("cuda", node.devices[0].number)) if backend.name == "cutile" else None
    socket_name = handover_socket(config.shared_memory_bytes, config.unix_socket)
    # Callers' GPU memory is mapped for one device.
    tickets = Tickets(socket_name, gpu_uuid(cuda.device) if cuda and len(node.devices) == 1 else "")
    handlers = ExpertShardHandlers(execution, executor, verifier, tickets)

    def make_grpc_server() -> grpc.aio.Server:
        interceptors = [RpcCounter(metrics, SERVICES), *security.interceptors, SmallMessages()]
        server = grpc.aio.server(interceptors=interceptors, options=server_options(config, info.max_message_bytes))
        handlers.register(server)
        health.register(server)
        reflection.enable_server_reflection(SERVICES, server)
        return server

    def add_port(server: grpc.aio.Server, address: Address) -> int:
        obstacle = obstacle_to_bind(address)
        if obstacle is not None:
            # gRPC would say so in lines of its own as well.
            raise OSError(obstacle)
        port = security.add_port(server, address)
        if config.unix_socket is not None:
            security.add_unix_socket(server, config.unix_socket)
        return port

    def tell(generations: Generations) -> None:
        engine.placement = generations.placement(config.max_tokens_per_request, node.parts)
        verifier.generations, loads.owned = generations, generations.serving.shard.experts
        executor.info = owning(executor.info, generations, node)
        metrics.placement.info(placement_of(executor.info))

    holdings = Holdings(generations, node, engine, metrics, tell)
    executor.update = lambda: holdings.progress
    local = _local_door(config, metrics, socket_name, tickets, engine, Gpu(node, cuda))
    entrance = GrpcDoor(config.listen, execution, make_grpc_server, add_port)
    admin = _admin_door(config, holdings, metrics)
    doors = tuple(door for door in (local, entrance, admin) if door is not None)
    return Server(
        config=config,
        metrics=metrics,
        security=security,
        failpoints=failpoints,
        holdings=holdings,
        node=node,
        engine=engine,
        watchdog=watchdog,
        gpu_watches=tuple(gpu_watches.values()),
        shadow=shadow,
        journal=journal,
        executor=executor,
        handlers=handlers,
        set_serving=set_serving,
        ready_file=ready_file,
        health=health,
        entrance=entrance,
        admin=admin,
        doors=doors,
        pages=_pages(config, metrics, executor, engine, journal, entrance, node, gpu_watches),
        tasks=metrics.new_tasks(),
    )


def _local_door(
    config: ServerConfig, metrics: Metrics, socket_name: str | None, tickets: Tickets, engine: Engine, gpu: Gpu
) -> LocalDoor | None:
    """The door for callers that share memory."""
    if socket_name is None:
        return None
    local = LocalDoor(socket_name, config.shared_memory_bytes, tickets, engine, gpu, metrics.new_tasks)
    metrics.shared_memory_bytes.set_function(lambda: local.mapped_bytes)
    return local


def _admin_door(config: ServerConfig, holdings: Holdings, metrics: Metrics) -> AdminDoor | None:
    if config.admin_listen is None:
        return None
    counting.export(metrics, holdings)
    own = replace(config, listen=config.admin_listen, auth_token_file=config.admin_token_file)
    return AdminDoor(config.admin_listen, holdings, ServerSecurity(own, metrics.security_file_errors.inc))


def _pages(
    config: ServerConfig,
    metrics: Metrics,
    executor: EngineExecutor,
    engine: Engine,
    journal: Journal,
    entrance: GrpcDoor,
    node: Node,
    gpu_watches: Mapping[int, GpuWatch],
) -> Pages:
    """Export what the server is and does."""
    info = executor.info
    metrics.build.info(build_of(info))
    metrics.queue_capacity.set(config.max_queued_tokens)
    metrics.queue_tokens.set_function(lambda: engine.queued_tokens)
    metrics.ready.set_function(lambda: engine.closed_because is None)
    metrics.placement.info(placement_of(info))
    metrics.weights_bytes.set_function(lambda: node.num_bytes)
    metrics.placement_epoch.set_function(lambda: engine.placement.epoch)
    metrics.owned.set_function(journal.owned_shares)
    if config.per_expert_metrics:
        metrics.export(metrics.expert_pairs)
    status = Status(
        config=config,
        info=lambda: executor.info,
        address=lambda: str(entrance.address),
        journal=journal,
        queued_tokens=lambda: engine.queued_tokens,
        closed_because=lambda: engine.closed_because,
        devices=lambda: devices.devices_of(node, {number: str(watch.reading) for number, watch in gpu_watches.items()}),
    )
    return Pages(config.metrics, status, metrics)
