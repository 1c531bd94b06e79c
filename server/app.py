"""The life of a server process: start up, serve, shut down."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial

from expertd._native import Engine, Failpoints
from expertd.kernels.numerics.backend import Backend, DeviceMemory
from expertd.proto.base.tasks import Tasks
from expertd.proto.codec import ShardInfo
from expertd.server.admin.holdings import Holdings
from expertd.server.admin.service import AdminDoor
from expertd.server.failpoints import watch
from expertd.server.options.config import Address, ServerConfig
from expertd.server.rpc.description import as_loaded
from expertd.server.rpc.door import Door, GrpcDoor
from expertd.server.rpc.executor import EngineExecutor
from expertd.server.rpc.handlers import ExpertShardHandlers
from expertd.server.rpc.health import Health
from expertd.server.rpc.security import ServerSecurity
from expertd.server.scheduling.device import DeviceOwner
from expertd.server.scheduling.generations import Generations
from expertd.server.scheduling.gpu_watch import GpuWatch
from expertd.server.scheduling.loading import load_layers
from expertd.server.scheduling.node import Node
from expertd.server.scheduling.shadow import ShadowCheck
from expertd.server.scheduling.shard import Shard
from expertd.server.scheduling.watchdog import Watchdog
from expertd.server.telemetry.journal import Journal
from expertd.server.telemetry.metrics import Metrics
from expertd.server.telemetry.pages import Pages
from expertd.server.telemetry.ready_file import ReadyFile

log = logging.getLogger(__name__)
MEMORY_SECONDS = 5.0
"""Between two looks at the GPU's memory."""


@dataclass(kw_only=True, eq=False)
class Server:
    """One expertd server, as `assembly` puts it together.

    `await run()` returns once a signal or `stop()` has ended it and it has drained.
    """

    config: ServerConfig
    metrics: Metrics
    security: ServerSecurity
    failpoints: Failpoints | None
    holdings: Holdings
    node: Node
    engine: Engine
    watchdog: Watchdog
    gpu_watches: tuple[GpuWatch, ...]
    shadow: ShadowCheck | None
    journal: Journal
    executor: EngineExecutor
    handlers: ExpertShardHandlers
    set_serving: Callable[[bool], None]
    """Tells health and the ready file."""
    ready_file: ReadyFile
    health: Health
    entrance: GrpcDoor
    """The one of `doors` at --listen."""
    admin: AdminDoor | None
    doors: tuple[Door, ...]
    pages: Pages
    tasks: Tasks
    notice_seconds: float = 0.25
    """Between the end of health and the end of connections, for callers that watch the one to leave the other."""
    ready: asyncio.Event = field(init=False, default_factory=asyncio.Event)
    _stopping: asyncio.Event = field(init=False, default_factory=asyncio.Event)

    @property
    def backend(self) -> Backend:
        """Of the first device."""
        return self.node.devices[0].backend

    @property
    def device(self) -> DeviceOwner:
        """The threads that call the first device's backend."""
        return self.node.devices[0].owner

    @property
    def info(self) -> ShardInfo:
        """What callers are told of the shard; complete once the weights are loaded."""
        return self.executor.info

    @property
    def shard(self) -> Shard:
        """What it owns."""
        return self.holdings.generations.serving.shard

    @property
    def address(self) -> Address:
        """Where it answers callers."""
        return self.entrance.address

    @property
    def metrics_address(self) -> Address:
        return self.pages.address

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
            self.tasks.keep(partial(watch, self.failpoints), "watching failpoints")
        log.info("backend %s on %s (%s)", self.info.backend, self.info.device, self.info.backend_reason)
        serving = self.holdings.generations.serving
        log.info("model %s", serving.ledger)
        stored = await load_layers(
            serving.checkpoint, serving.ledger, serving.shard, self.node, self.metrics, self.failpoints
        )
        self.holdings.generations = Generations(dataclasses.replace(serving, stored=stored))
        admin = self.admin.address if self.admin is not None else None
        self.executor.info = as_loaded(self.info, self.holdings.generations, self.node, self.metrics_address, admin)
        memory = await self.node.memory()
        if memory:
            self.metrics.export(self.metrics.device_busy, self.metrics.device_memory)
            self._tell_memory(memory)
            self.tasks.keep(self._watch_memory, "watching the GPU's memory")
        self.engine.placement = self.shard.placement(self.config.max_tokens_per_request, self.node.parts)
        self.engine.use(await self.node.begin(self.failpoints))
        self.engine.start()
        self.pages.watch("engine", self.engine.await_turn)
        self.engine.open()
        self.ready_file.addresses = {"listen": str(self.address), "metrics": str(self.metrics_address)}
        if self.admin is not None:
            self.ready_file.addresses["admin"] = str(self.admin.address)
        self.set_serving(True)
        log.info("serving on %s (%s), metrics on http://%s/metrics", self.address, self.security, self.metrics_address)
        for gpu_watch in self.gpu_watches:
            self.tasks.keep(gpu_watch.run, "watching the GPU's health")
        self.ready.set()

    async def shutdown(self) -> None:
        """Turn unhealthy, say GOAWAY, answer what is in flight, stop."""
        log.info("draining for at most %g s", self.config.drain_seconds)
        deadline = time.monotonic() + self.config.drain_seconds
        draining = "the server is draining; use another replica"
        self.engine.close(draining, refusing=False)
        self.set_serving(False)
        # Requests that are on their way are answered yet, so that callers who watch health have none to repeat.
        await asyncio.sleep(min(self.notice_seconds, self.config.drain_seconds))
        self.engine.close(draining)
        left = max(0.0, deadline - time.monotonic())
        await asyncio.gather(*(door.drain(left) for door in self.doors))
        await asyncio.gather(*(door.close() for door in self.doors))
        self.tasks.cancel()
        self.executor.stop()
        await self.pages.stop()
        if not await asyncio.to_thread(self.engine.stop):
            log.error("the engine hangs: it is left behind with all that it uses")
        self.journal.read()
        await asyncio.to_thread(self.node.stop)
        if self.shadow is not None:
            await asyncio.to_thread(self.shadow.stop)
        for generation in self.holdings.generations.all:
            generation.checkpoint.close()
        log.info("stopped")

    async def _listen(self) -> None:
        """Answer health checks and scrapes from the start; the other RPCs say that the server is starting."""
        self.set_serving(False)
        self.entrance.bind()
        self.pages.start()
        self.node.start()
        self.executor.start()
        if self.shadow is not None:
            self.shadow.start()
        self.tasks.keep(self.journal.run, "telling of requests")
        for door in self.doors:
            await door.listen()

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

    async def _watch_memory(self) -> None:
        while True:
            await asyncio.sleep(MEMORY_SECONDS)
            self._tell_memory(await self.node.memory())

    def _tell_memory(self, memory: Mapping[int, DeviceMemory]) -> None:
        for device, its in memory.items():
            for kind, size in dataclasses.asdict(its).items():
                self.metrics.device_memory.labels(device, kind).set(size)

    def _install_signal_handlers(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, partial(self._on_signal, number))

    def _on_signal(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            log.warning("second signal: ending at once, requests in flight are lost")
            logging.shutdown()
            os._exit(128 + number)
        self.stop()
