"""The life of a server process: start up, serve, shut down."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import time
from collections.abc import Coroutine
from functools import partial
from typing import cast

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from expertd.kernels.memory.gpu import current_gpu, gpu_uuid
from expertd.kernels.numerics.backend import Backend, DeviceMemory
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.kernels.weights.files import write_json
from expertd.kernels.weights.ledger import Ledger
from expertd.proto import codec
from expertd.proto.base.loopback import UNIX
from expertd.server.failpoints import FaultyBackend, FaultyHandlers, failpoints_from_environment
from expertd.server.local.door import LocalListener, handover_socket
from expertd.server.local.front_ends import FrontEnds
from expertd.server.local.link import Settings
from expertd.server.options.config import Address, InvalidOption, ServerConfig
from expertd.server.rpc.description import describe, with_digests
from expertd.server.rpc.handlers import ExpertShardHandlers
from expertd.server.rpc.limits import server_options
from expertd.server.rpc.security import ServerSecurity
from expertd.server.rpc.tickets import Tickets
from expertd.server.scheduling.backends import choose_backend
from expertd.server.scheduling.batching import Scheduler
from expertd.server.scheduling.device import DeviceOwner
from expertd.server.scheduling.loading import load_layers
from expertd.server.scheduling.shadow import ShadowCheck
from expertd.server.scheduling.shard import Shard
from expertd.server.scheduling.verifier import Verifier
from expertd.server.scheduling.watchdog import Watchdog
from expertd.server.telemetry.journal import Journal
from expertd.server.telemetry.loads import ExpertLoads
from expertd.server.telemetry.metrics import Metrics
from expertd.server.telemetry.pages import Pages
from expertd.server.telemetry.rpc_counter import RpcCounter
from expertd.server.telemetry.status import Status
from expertd.server.telemetry.tracing import RequestTracer

log = logging.getLogger(__name__)
HEALTH_NAMES = ("", codec.SERVICE)
SERVICES = (codec.SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
MEMORY_SECONDS = 5.0
"""Between two looks at the GPU's memory."""
MAX_INT = 2**31 - 1
NOTICE_SECONDS = 0.25
"""Between the end of health and the end of connections, for callers that watch the one to leave the other."""


class Server:
    """One expertd server. `await run()` returns once a signal or `stop()` has ended it and it has drained."""

    def __init__(self, config: ServerConfig, metrics: Metrics, tracer: RequestTracer | None = None) -> None:
        """Opens the checkpoint. Raises `InvalidOption`, `InvalidConfig` or `CheckpointError`."""
        self.config = config
        self.metrics = metrics
        self.security = ServerSecurity(config)
        self.checkpoint = Checkpoint(config.model)
        self.ledger = Ledger(self.checkpoint, config.manifest)
        self.shard = Shard(
            config=self.checkpoint.config,
            model_fingerprint=self.ledger.fingerprint,
            placement_epoch=time.time_ns() // 1000,
            layers=config.layers or self.checkpoint.config.moe_layers,
            experts=config.experts,
        )
        self.backend, self.backend_reason = choose_backend(config, self.checkpoint.config)
        self.failpoints = failpoints_from_environment()
        if self.failpoints is not None:
            self.backend = cast(Backend, FaultyBackend(self.backend, self.failpoints))
        self.device = DeviceOwner()
        self.scheduler = Scheduler(
            self.backend,
            self.device,
            len(config.experts),
            max_batch_tokens=config.max_batch_tokens,
            max_queued_tokens=config.max_queued_tokens,
            max_queued_bytes=config.max_queued_bytes,
            on_batch=self.metrics.observe_batch,
            on_fault=lambda error: self.watchdog.suspect(error),
            on_abandon=self._disconnect,
        )
        self.watchdog = Watchdog(self.backend, self.device, self.scheduler, config.device_timeout, self._set_serving)
        self.info = describe(config, self.shard, self.ledger, self.backend, self.backend_reason)
        self.loads = ExpertLoads(self.shard.layers, self.shard.experts)
        self.journal = Journal(self.metrics, self.loads, tracer)
        verifier = Verifier(self.checkpoint, self.shard, self.scheduler, config.max_tokens_per_request)
        self.shadow = self._shadow_check()
        socket_name = handover_socket(config.shared_memory_bytes, config.unix_socket)
        on_gpu = self.backend.name == "cutile"
        tickets = Tickets(socket_name, gpu_uuid(current_gpu()) if on_gpu else "")
        parts = (self.shard, self.info, self.scheduler, verifier, self.shadow, self.journal, tickets)
        if self.failpoints is None:
            self.handlers = ExpertShardHandlers(*parts)
        else:
            self.handlers = FaultyHandlers(*parts, self.failpoints)
        self.local = LocalListener(
            socket_name,
            config.shared_memory_bytes - config.front_ends * config.front_end_bytes,
            tickets,
            self.handlers.respond,
            self.device,
            gpu=on_gpu,
        )
        self.metrics.shared_memory_bytes.set_function(lambda: self.local.mapped_bytes)
        self.front_ends = FrontEnds(config.front_ends, self.handlers.respond, self.device, gpu=on_gpu)
        self.metrics.front_ends.set_function(lambda: self.front_ends.listening)
        self.health = health.HealthServicer()
        self.address: Address = config.listen
        self.metrics_address: Address = config.metrics
        self.ready = asyncio.Event()
        self._stopping = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None

    async def run(self) -> None:
        self._install_signal_handlers()
        await self._listen()
        try:
            await self._until_stopped(self.startup())
            await self._until_stopped(self.watchdog.run())
        finally:
            await self.shutdown()

    def stop(self) -> None:
        """Begin the shutdown; `run()` returns when it is complete."""
        self._stopping.set()

    async def startup(self) -> None:
        """Load and check the weights, then turn healthy."""
        if self.failpoints is not None:
            log.warning("failpoints are on, for tests only: %s", self.failpoints)
        log.info("backend %s on %s (%s)", self.backend.name, self.backend.device, self.backend_reason)
        log.info("model %s", self.ledger)
        await load_layers(self.checkpoint, self.ledger, self.shard, self.backend, self.device, self.metrics)
        self.handlers.info = self.info = with_digests(self.info, self.ledger)
        memory = await self.device.call(self.backend.memory)
        if memory is not None:
            self._watching = asyncio.create_task(self._watch_memory(memory))
        await self.front_ends.until_listening()
        self.scheduler.open()
        await self._set_serving(True)
        if self.config.ready_file is not None:
            addresses = {"listen": str(self.address), "metrics": str(self.metrics_address)}
            write_json(addresses, self.config.ready_file)
        through = f"{self.security}, {self.config.front_ends} front ends" if self.config.front_ends else self.security
        log.info("serving on %s (%s), metrics on http://%s/metrics", self.address, through, self.metrics_address)
        self.ready.set()

    async def shutdown(self) -> None:
        """Turn unhealthy, say GOAWAY, answer what is in flight, stop."""
        log.info("draining for at most %g s", self.config.drain_seconds)
        draining = "the server is draining; use another replica"
        self.scheduler.close(draining, refusing=False)
        await self._set_serving(False)
        # Requests that are on their way are answered yet, so that callers who watch health have none to repeat.
        await asyncio.sleep(NOTICE_SECONDS)
        self.scheduler.close(draining)
        self.handlers.stop_reading()
        going_away = asyncio.ensure_future(self.grpc_server.stop(self.config.drain_seconds))
        await asyncio.gather(
            self.handlers.answered(self.config.drain_seconds),
            self.local.stop(self.config.drain_seconds),
            self.front_ends.stop(self.config.drain_seconds),
        )
        # What is left are watchers of health, who need not leave when they are told.
        await self.grpc_server.stop(None)
        await going_away
        if self._watching is not None:
            self._watching.cancel()
        self.device.stop()
        if self.shadow is not None:
            await asyncio.to_thread(self.shadow.stop)
        await asyncio.to_thread(self._metrics_server.shutdown)
        self._metrics_server.server_close()
        self.checkpoint.close()
        if self.config.ready_file is not None:
            self.config.ready_file.unlink(missing_ok=True)
        log.info("stopped")

    async def _listen(self) -> None:
        """Answer health checks and scrapes from the start; the other RPCs say that the server is starting."""
        # What all callers of a front end ask of the server comes over one connection.
        max_streams = MAX_INT if self.config.front_ends else self.config.max_streams
        options = server_options(self.config, self.info.max_message_bytes, max_streams)
        self.grpc_server = grpc.aio.server(
            interceptors=[RpcCounter(self.metrics, SERVICES), *self.security.interceptors],
            options=options,
        )
        self.handlers.register(self.grpc_server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.grpc_server)
        reflection.enable_server_reflection(SERVICES, self.grpc_server)
        await self._set_serving(False)
        self.address = self._bind()
        if self.config.unix_socket is not None:
            self.security.add_unix_socket(self.grpc_server, self.config.unix_socket)
        try:
            self._metrics_server, _ = start_http_server(
                self.config.metrics.port, self.config.metrics.host, self.metrics.registry
            )
        except OSError as error:
            raise InvalidOption(f"--metrics {self.config.metrics} cannot be bound: {error}") from None
        self.metrics_address = dataclasses.replace(self.config.metrics, port=self._metrics_server.server_port)
        self._metrics_server.set_app(Pages(self._observe(), self.metrics.application(), asyncio.get_running_loop()))
        self.device.start()
        if self.shadow is not None:
            self.shadow.start()
        try:
            self.local.start()
        except OSError as error:
            raise InvalidOption(f"--unix-socket {self.config.unix_socket}.shm cannot be bound: {error}") from None
        await self.grpc_server.start()
        if self.config.front_ends:
            width, socket = self.shard.config.hidden_size, str(self.front_ends.socket)
            self.front_ends.start(Settings(self.config, self.address, socket, width, self.info.max_message_bytes))

    def _bind(self) -> Address:
        """Listen for callers, or for the front ends that do so; the address."""
        listen = self.config.listen
        try:
            if not self.config.front_ends:
                return dataclasses.replace(listen, port=self.security.add_port(self.grpc_server, listen))
            address = self.front_ends.reserve(listen)
            self.grpc_server.add_insecure_port(f"{UNIX}{self.front_ends.socket}")
            return address
        except (OSError, RuntimeError) as error:
            raise InvalidOption(f"--listen {listen} cannot be bound: {error}") from None

    def _observe(self) -> Status:
        """Export what this server is and does."""
        scheduler = self.scheduler
        self.metrics.describe(self.info)
        self.metrics.watch_loads(self.loads, self.config.per_expert_metrics)
        self.metrics.watch(
            queue_tokens=lambda: scheduler.queued_tokens,
            queue_capacity=self.config.max_queued_tokens,
            in_flight=lambda: self.journal.in_flight,
            ready=lambda: scheduler.closed_because is None,
        )
        return Status(
            config=self.config,
            info=self.info,
            address=str(self.address),
            journal=self.journal,
            loads=self.loads,
            queued_tokens=lambda: scheduler.queued_tokens,
            closed_because=lambda: scheduler.closed_because,
        )

    def _disconnect(self) -> None:
        """Take shared memory from everyone, now that the device may still write to it."""
        self.local.disconnect()
        self.front_ends.disconnect()

    async def _until_stopped(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` until it ends or the server is stopped."""
        working = asyncio.ensure_future(work)
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait((working, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if working.done():
            working.result()
        else:
            working.cancel()

    def _shadow_check(self) -> ShadowCheck | None:
        if self.config.shadow_check_rate == 0:
            return None
        rate, registry = self.config.shadow_check_rate, self.metrics.registry
        return ShadowCheck(self.checkpoint, self.shard, self.backend.name, rate, registry)

    async def _watch_memory(self, memory: DeviceMemory) -> None:
        """On the device thread, which alone calls the backend."""
        tell = self.metrics.watch_device()
        found: DeviceMemory | None = memory
        while found is not None:
            tell(found)
            await asyncio.sleep(MEMORY_SECONDS)
            found = await self.device.call(self.backend.memory)

    def _install_signal_handlers(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, partial(self._on_signal, number))

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            log.warning("second signal: ending at once, requests in flight are lost")
            os._exit(128 + number)
        self.stop()

    async def _set_serving(self, serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in HEALTH_NAMES:
            await self.health.set(name, status.SERVING if serving else status.NOT_SERVING)
