"""Calls to a server over gRPC: a few connections, each with one long-lived stream."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable
from functools import partial
from operator import attrgetter

import grpc
import grpc.aio
import torch
from grpc_health.v1 import health_pb2

from expertd._native import response_id
from expertd.client.base.begun import Begun
from expertd.client.transport.answer import answer, finished, in_time
from expertd.client.transport.interface import Silent
from expertd.client.transport.native_call import OneOwner, stays
from expertd.client.transport.security import ClientSecurity
from expertd.kernels.numerics.quantize import FP8
from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError, ServerFault, Unavailable, error_from_status
from expertd.proto.base.tasks import Tasks
from expertd.proto.codec import ExecuteCall, ExecuteResult, RawResponse, Registration, ShardInfo

log = logging.getLogger(__name__)
StreamCall = grpc.aio.StreamStreamCall[bytes, bytes]
CHUNK_BYTES = 4 << 20
RETRY_SECONDS = 0.1
LIFE_SECONDS, SILENT_SECONDS = 0.4, 1.4
"""Between two questions for a sign of life, and how long each waits: silence is noticed within 1.8 s."""
HEALTH = health_pb2.HealthCheckRequest(service=codec.SERVICE)
KEEPALIVE_MS = 3000
"""Without traffic a server is asked for a sign of life, and given as long to answer."""
HANDSHAKE_MS = 1500
"""A server that accepts a connection has as long to speak before another one is tried."""


class GrpcTransport:
    """A few connections, each with one long-lived bidirectional stream."""

    shared_devices: frozenset[torch.device] = frozenset()
    segments: tuple[()] = ()

    def __init__(
        self,
        address: str,
        channels: int = 1,
        security: ClientSecurity | None = None,
        chunk_bytes: int = CHUNK_BYTES,
        *,
        checked: bool | None = None,
    ) -> None:
        """`checked`: whether requests have checksums; None: if the connection is plaintext."""
        self.address = address
        self.chunk_bytes = chunk_bytes
        self._security = security or ClientSecurity()
        self.checked = not self._security.encrypts(address) if checked is None else checked
        self._num_channels = channels
        self._complaint = ""
        self._open_channels()
        self._server = OneOwner()
        self.heard = -math.inf

    def _open_channels(self) -> None:
        # Before the files are read, so that what replaces them meanwhile is not missed.
        stamp = self._security.stamp()
        *channels, health = (_Channel(self.address, self._security, self._hear) for _ in range(self._num_channels + 1))
        # Health is asked on a connection without tensors, behind which a sign of life would have to wait.
        self._channels, self._health, self._stamp = tuple(channels), health, stamp

    async def _use_new_certificates(self) -> None:
        """Connect anew where files of certificates were replaced; those that cannot be used leave it as it was."""
        if self._security.stamp() == self._stamp:
            return
        former = (*self._channels, self._health)
        try:
            self._open_channels()
        except ValueError as error:
            # Not even by half: a new certificate whose key has not arrived yet.
            if str(error) != self._complaint:
                self._complaint = str(error)
                log.error("%s: the former certificates stay in force: %s", self.address, error)
            return
        self._complaint = ""
        log.info("%s: certificates were read again", self.address)
        await asyncio.gather(*(channel.close() for channel in former))

    async def get_shard(self, timeout: float) -> ShardInfo:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while True:
            await self._use_new_certificates()
            timeout = max(deadline - loop.time(), 0.001)
            metadata = self._security.metadata()
            try:
                # On every connection: one that is not back yet would fail the first call that is sent on it.
                answers = await asyncio.gather(
                    *(
                        channel.get_shard(codec.ShardRequest(), timeout=timeout, metadata=metadata)
                        for channel in self._channels
                    )
                )
                return codec.decode_shard(answers[0])
            except grpc.aio.AioRpcError as error:
                reason = _as_error(self.address, error)
            if not isinstance(reason, Unavailable) or loop.time() + RETRY_SECONDS >= deadline:
                raise reason
            await asyncio.sleep(RETRY_SECONDS)

    async def execute(self, call: ExecuteCall) -> ExecuteResult:
        begun = None if call.hidden.is_cuda else self._server.begin(call, checked=self.checked)
        message = codec.encode_call(call, checked=self.checked) if begun is None else begun.messages[0][3]
        exchange = self.exchange(call.request_id, message)
        if begun is None or call.reply_dtype == FP8 or stays(call.hidden, call.reply_dtype):
            # Partials are left in the message.
            return await answer(self.address, call, _parsed(exchange))
        begun.answer(0, await in_time(self.address, call, exchange))
        result = finished(self.address, call, begun, 0.0, checked=self.checked)
        assert result is not None, "messages need no room"
        return result

    def exchange(self, request_id: int, message: bytes) -> Awaitable[bytes]:
        channel = min(self._channels, key=attrgetter("bytes_in_flight"))
        return channel.exchange(request_id, message)

    async def register_shared_memory(self, timeout: float, gpu: str = "") -> Registration:
        """Where to hand over memory, beside it that of the GPU with this UUID if one is given.

        Raises `NotPermitted` when the server shares none with this process.
        """
        try:
            return await self._channels[0].register_shared_memory(
                codec.RegistrationRequest(gpu=gpu), timeout=timeout, metadata=self._security.metadata()
            )
        except grpc.aio.AioRpcError as error:
            raise error_from_status(error.code(), str(error.details())) from None

    def _hear(self) -> None:
        self.heard = time.monotonic()

    async def until_not_serving(self) -> Unavailable:
        watching = [asyncio.ensure_future(self._until_lost()), asyncio.ensure_future(self._until_silent())]
        try:
            done, _ = await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
            return done.pop().result()
        finally:
            for task in watching:
                task.cancel()

    async def _until_silent(self) -> Silent:
        """Ask for a sign of life again and again, since a server that is frozen or cut off closes no connection."""
        patience = SILENT_SECONDS
        while True:
            asked = time.monotonic()
            try:
                await self._health.check_health(HEALTH, timeout=patience)
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                    if self.heard < asked:
                        return Silent(f"{self.address}: no sign of life within {SILENT_SECONDS} s")
                    # Calls were answered meanwhile: it may have been silent since the last of them.
                    patience = max(self.heard + SILENT_SECONDS - time.monotonic(), LIFE_SECONDS)
                    continue
            patience = SILENT_SECONDS
            await asyncio.sleep(LIFE_SECONDS)

    async def _until_lost(self) -> Unavailable:
        watch = self._health.watch_health(HEALTH)
        try:
            async for answer in watch:
                if answer.status != health_pb2.HealthCheckResponse.SERVING:
                    break
        except grpc.aio.AioRpcError as error:
            if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                # Another implementation of the contract: its calls have to tell.
                await asyncio.Event().wait()
            return Unavailable(f"{self.address}: the connection was lost: {error.details()}")
        finally:
            watch.cancel()
        return Unavailable(f"{self.address}: its health is not SERVING")

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in (*self._channels, self._health)))


class _Channel:
    """One connection; its stream is opened when first needed and again after it ended."""

    def __init__(self, address: str, security: ClientSecurity, hear: Callable[[], None]) -> None:
        """`hear` is called for every answer of a stream."""
        self._address = address
        self._security = security
        self._hear = hear
        self._channel = security.open_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                # A connection of its own: channels to one address would otherwise share one.
                ("grpc.use_local_subchannel_pool", 1),
                # A server that returns is found again soon, even if it is far away or short of processors: what gRPC
                # calls the least pause between two attempts is how long each of them may take.
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 500),
                ("grpc.min_reconnect_backoff_ms", HANDSHAKE_MS),
                # A server that is cut off or frozen closes no connection: ask it for signs of life.
                ("grpc.keepalive_time_ms", KEEPALIVE_MS),
                ("grpc.keepalive_timeout_ms", KEEPALIVE_MS),
                ("grpc.http2.max_pings_without_data", 0),
            ],
        )
        self.get_shard = self._channel.unary_unary(
            f"/{codec.SERVICE}/GetShard", codec.ShardRequest.SerializeToString, codec.ShardResponse.FromString
        )
        self.check_health = self._channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        self.watch_health = self._channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        self.register_shared_memory = self._channel.unary_unary(
            f"/{codec.SERVICE}/RegisterSharedMemory",
            codec.RegistrationRequest.SerializeToString,
            codec.Registration.FromString,
        )
        self._execute_stream: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(
            f"/{codec.SERVICE}/ExecuteStream"
        )
        self._stream: _Stream | None = None

    @property
    def bytes_in_flight(self) -> int:
        return 0 if self._stream is None else self._stream.bytes_in_flight

    def exchange(self, request_id: int, request: bytes) -> asyncio.Future[bytes]:
        if self._stream is None or self._stream.ended:
            try:
                call = self._execute_stream(metadata=self._security.metadata())
            except (ExpertdError, grpc.aio.UsageError) as error:
                failed = asyncio.get_running_loop().create_future()
                known = error if isinstance(error, ExpertdError) else Unavailable(f"{self._address}: {error}")
                failed.set_exception(known)
                return failed
            self._stream = _Stream(call, self._address, self._hear)
        return self._stream.exchange(request_id, request)

    async def close(self) -> None:
        if self._stream is not None:
            await self._stream.close()
        await self._channel.close()


class _Stream:
    """One bidirectional call: requests out, responses matched to them by id."""

    def __init__(self, call: StreamCall, address: str, hear: Callable[[], None]) -> None:
        self._call = call
        self._address = address
        self._hear = hear
        self._waiting: dict[int, asyncio.Future[bytes]] = {}
        self._outbox: asyncio.Queue[tuple[bytes | Begun, asyncio.Future[bytes] | None]] = asyncio.Queue()
        self._unwritten = 0
        self._tasks = Tasks()
        self._reader = self._tasks.start(self._read(), f"reading the answers of {address}")
        self._writer = self._tasks.start(self._write(), f"writing to {address}")
        self.bytes_in_flight = 0

    @property
    def ended(self) -> bool:
        return self._call.done() or self._reader.done()

    def exchange(self, request_id: int, request: bytes) -> asyncio.Future[bytes]:
        """Send `request`; the response with its id. It is cancelled with what this returns."""
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(partial(self._settle, request_id, len(request)))
        self._waiting[request_id] = answer
        self.bytes_in_flight += len(request)
        if self._unwritten:
            self._put(request, answer)
        else:
            # Now: before the writer wakes up, the loop does whatever else it has to do.
            self._put(Begun(self._call.write(request)), None)
        return answer

    def _put(self, message: bytes | Begun, answer: asyncio.Future[bytes] | None) -> None:
        self._unwritten += 1
        self._outbox.put_nowait((message, answer))

    def _settle(self, request_id: int, num_bytes: int, answer: asyncio.Future[bytes]) -> None:
        del self._waiting[request_id]
        self.bytes_in_flight -= num_bytes
        if answer.cancelled():
            self._put(codec.encode_cancellation(request_id), None)

    async def close(self) -> None:
        self._call.cancel()
        await self._tasks.settle()

    async def _write(self) -> None:
        """Write messages one after another, but for requests that nobody waits for any more."""
        # Why the stream ended is for the reader to find out and to tell everyone who waits.
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                message, answer = await self._outbox.get()
                if isinstance(message, Begun):
                    await message
                elif answer is None or not answer.done():
                    await self._call.write(message)
                self._unwritten -= 1
                del message, answer

    async def _read(self) -> None:
        """Hand responses to those who wait until the stream ends; then fail those still waiting."""
        ended: ExpertdError = Unavailable(f"{self._address}: its answers are not read any more")
        try:
            async for data in self._call:
                self._hear()
                request_id = response_id(data)
                future = self._waiting.get(codec.parse_response(data).request_id if request_id is None else request_id)
                if future is not None and not future.done():
                    future.set_result(data)
            ended = Unavailable(f"{self._address}: the server ended the stream")
        except grpc.aio.AioRpcError as error:
            ended = _as_error(self._address, error)
        except ServerFault as error:
            # What else the stream carries cannot be trusted either.
            self._call.cancel()
            ended = ServerFault(f"{self._address}: {error}")
        except asyncio.CancelledError:
            ended = Unavailable(f"{self._address}: the connection was closed")
        finally:
            self._writer.cancel()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(ended.again())


async def _parsed(exchange: Awaitable[bytes]) -> RawResponse:
    return codec.parse_response(await exchange)


def _as_error(address: str, error: grpc.aio.AioRpcError) -> ExpertdError:
    if error.code() == grpc.StatusCode.CANCELLED:
        # Not by this side: a server that ends cuts off what arrives too late for an answer.
        return Unavailable(f"{address}: cut off by the server: {error.details()}")
    return error_from_status(error.code(), f"{address}: {error.details()}")
