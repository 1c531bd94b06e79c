"""What a server is made of."""

from __future__ import annotations

import time

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from expertd.kernels.memory.gpu import current_gpu, gpu_uuid
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.ledger import Ledger
from expertd.proto import codec
from expertd.proto.codec import ShardInfo
from expertd.server.app import Server
from expertd.server.failpoints import FaultyBackend, FaultyExecutor, failpoints_from_environment
from expertd.server.local.door import LocalDoor
from expertd.server.local.front_ends import FrontEnds
from expertd.server.local.gpu import Gpu
from expertd.server.local.handover import handover_socket
from expertd.server.options.config import Address, ServerConfig
from expertd.server.rpc.description import describe
from expertd.server.rpc.door import GrpcDoor
from expertd.server.rpc.execution import ExecuteHandlers
from expertd.server.rpc.executor import ShardExecutor
from expertd.server.rpc.handlers import ExpertShardHandlers
from expertd.server.rpc.health import Health
from expertd.server.rpc.incoming import Executor
from expertd.server.rpc.limits import server_options
from expertd.server.rpc.security import ServerSecurity
from expertd.server.rpc.tickets import Tickets
from expertd.server.scheduling.backends import choose_backend
from expertd.server.scheduling.batching import Scheduler
from expertd.server.scheduling.device import DeviceOwner
from expertd.server.scheduling.shadow import ShadowCheck
from expertd.server.scheduling.shard import Shard
from expertd.server.scheduling.verifier import Verifier
from expertd.server.scheduling.watchdog import Watchdog
from expertd.server.telemetry.journal import Journal
from expertd.server.telemetry.loads import ExpertLoads
from expertd.server.telemetry.metrics import Metrics
from expertd.server.telemetry.pages import Pages
from expertd.server.telemetry.rpc_counter import RpcCounter
from expertd.server.telemetry.status import Status, build_of, placement_of
from expertd.server.telemetry.tracing import RequestTracer

SERVICES = (codec.SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)


def assemble(config: ServerConfig, metrics: Metrics, tracer: RequestTracer | None = None) -> Server:
    """A server, ready to `run`. Opens the checkpoint; raises `InvalidOption`, `InvalidConfig` or `CheckpointError`."""
    security = ServerSecurity(config)
    checkpoint = Checkpoint(config.model)
    ledger = Ledger(checkpoint, config.manifest)
    shard = Shard(
        config=checkpoint.config,
        model_fingerprint=ledger.fingerprint,
        placement_epoch=time.time_ns() // 1000,
        layers=config.layers or checkpoint.config.moe_layers,
        experts=config.experts,
    )
    backend, reason = choose_backend(config, checkpoint.config)
    failpoints = failpoints_from_environment()
    if failpoints is not None:
        backend = FaultyBackend(backend, failpoints)
    info = describe(config, shard, ledger, backend, reason)
    device, health = DeviceOwner(), Health()

    def disconnect() -> None:
        for door in doors:
            door.disconnect()

    scheduler = Scheduler(
        backend,
        device,
        len(config.experts),
        max_batch_tokens=config.max_batch_tokens,
        max_queued_tokens=config.max_queued_tokens,
        max_queued_bytes=config.max_queued_bytes,
        metrics=metrics,
        on_fault=lambda error: watchdog.suspect(error),
        on_abandon=disconnect,
    )
    watchdog = Watchdog(backend, device, scheduler, config.device_timeout, health.set_serving)
    loads = ExpertLoads(shard.layers, shard.experts)
    journal = Journal(metrics, loads, tracer)
    rate = config.shadow_check_rate
    shadow = ShadowCheck(checkpoint, shard, backend.name, rate, metrics) if rate else None
    verifier = Verifier(checkpoint, shard, scheduler, config.max_tokens_per_request)
    on_shard = ShardExecutor(shard, info, scheduler, shadow, journal)
    executor = on_shard if failpoints is None else FaultyExecutor(on_shard, failpoints)
    execution = ExecuteHandlers(executor, info.max_queued_bytes)

    gpu = Gpu(device, present=backend.name == "cutile")
    socket_name = handover_socket(config.shared_memory_bytes, config.unix_socket)
    tickets = Tickets(socket_name, gpu_uuid(current_gpu()) if gpu.present else "")
    handlers = ExpertShardHandlers(execution, lambda: on_shard.info, scheduler, verifier, tickets)

    def make_grpc_server() -> grpc.aio.Server:
        interceptors = [RpcCounter(metrics, SERVICES), *security.interceptors]
        server = grpc.aio.server(interceptors=interceptors, options=server_options(config, info.max_message_bytes))
        handlers.register(server)
        health_pb2_grpc.add_HealthServicer_to_server(health, server)
        reflection.enable_server_reflection(SERVICES, server)
        return server

    def add_port(server: grpc.aio.Server, address: Address) -> int:
        port = (front_ends or security).add_port(server, address)
        if config.unix_socket is not None:
            security.add_unix_socket(server, config.unix_socket)
        return port

    local = _local_door(config, metrics, socket_name, tickets, executor, gpu)
    front_ends = _front_ends(config, metrics, shard, info, executor, gpu)
    entrance = GrpcDoor(config.listen, execution, make_grpc_server, add_port)
    doors = tuple(door for door in (local, entrance, front_ends) if door is not None)
    return Server(
        config=config,
        metrics=metrics,
        security=security,
        failpoints=failpoints,
        checkpoint=checkpoint,
        ledger=ledger,
        shard=shard,
        backend=backend,
        device=device,
        scheduler=scheduler,
        watchdog=watchdog,
        shadow=shadow,
        journal=journal,
        executor=on_shard,
        handlers=handlers,
        health=health,
        entrance=entrance,
        doors=doors,
        pages=_pages(config, metrics, info, scheduler, journal, loads, entrance),
        tasks=metrics.new_tasks(),
    )


def _local_door(
    config: ServerConfig, metrics: Metrics, socket_name: str | None, tickets: Tickets, executor: Executor, gpu: Gpu
) -> LocalDoor | None:
    """The door for callers that share memory, of which front ends have their part."""
    if socket_name is None:
        return None
    max_bytes = config.shared_memory_bytes - config.front_ends * config.front_end_bytes
    local = LocalDoor(socket_name, max_bytes, tickets, executor, gpu, metrics.new_tasks)
    metrics.shared_memory_bytes.set_function(lambda: local.mapped_bytes)
    return local


def _front_ends(
    config: ServerConfig, metrics: Metrics, shard: Shard, info: ShardInfo, executor: Executor, gpu: Gpu
) -> FrontEnds | None:
    if not config.front_ends:
        return None
    front_ends = FrontEnds(config, shard.config.hidden_size, info.max_message_bytes, executor, gpu, metrics.new_tasks)
    metrics.front_ends.set_function(lambda: front_ends.listening)
    return front_ends


def _pages(
    config: ServerConfig,
    metrics: Metrics,
    info: ShardInfo,
    scheduler: Scheduler,
    journal: Journal,
    loads: ExpertLoads,
    entrance: GrpcDoor,
) -> Pages:
    """Export what the server is and does."""
    metrics.build.info(build_of(info))
    metrics.placement.info(placement_of(info))
    if config.per_expert_metrics:
        metrics.export(metrics.expert_pairs)
    status = Status(
        config=config,
        info=info,
        address=lambda: str(entrance.address),
        journal=journal,
        loads=loads,
        queued_tokens=lambda: scheduler.queued_tokens,
        closed_because=lambda: scheduler.closed_because,
    )
    return Pages(config.metrics, status, metrics)
