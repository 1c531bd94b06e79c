"""Calls that are work on the caller's CUDA stream: nothing of them waits for the host, so that graphs can hold them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from expertd.client.base.devices import on_device
from expertd.client.call.caller import Caller
from expertd.client.call.choice import NOBODY
from expertd.client.fleet.holdings import Known
from expertd.client.fleet.member import Member
from expertd.client.stream.arguments import checked
from expertd.client.stream.lane import StreamLane
from expertd.client.stream.launch import enqueue
from expertd.client.stream.operator import register
from expertd.client.stream.tables import Tables
from expertd.client.stream.terms import Terms
from expertd.kernels.cutile.base.shape import SHAPE_CLASSES
from expertd.kernels.numerics.quantize import FP8
from expertd.proto.base.errors import ExpertdError, InvalidBatch, Overloaded, Unavailable
from expertd.proto.base.tasks import Tasks

LOOK_SECONDS = 0.05
"""Between two looks for calls that will not be answered."""
GIVEN_BACK_SECONDS = 5.0
"""In which a server has room again for as much as it had of lanes that were closed."""


class StreamCalls:
    """Of one coordinator, from one device. They follow each other, on whatever stream they are; graphs' must, too."""

    def __init__(self, caller: Caller, device: torch.device, max_tokens: int, timeout: float) -> None:
        """Of at most `max_tokens` tokens; an answer may take `timeout` seconds. `renew` comes before the first call.

        `device` is one of `as_device`.
        """
        if max_tokens < 1:
            raise InvalidBatch(f"max_tokens is {max_tokens}; it must be at least 1")
        if timeout <= 0:
            raise InvalidBatch(f"timeout is {timeout}; it must be greater than 0")
        self._caller = caller
        self._device = device
        self._sizes = (*(size for size in SHAPE_CLASSES if size < max_tokens), max_tokens)
        self._timeout = timeout
        self._lanes: list[StreamLane] = []
        self._retired: list[StreamLane] = []
        """Which graphs may yet wait on."""
        self._kept: list[Tables] = []
        """Which graphs go on reading."""
        self._captured = False
        self._launching = threading.Lock()
        """Held while a call's kernels are launched, by a simulated device until they are done, and while the tables
        change."""
        self._untold: ExpertdError | None = None
        """Of lanes that are gone."""
        self._failed: deque[tuple[Member, ExpertdError]] = deque()
        """Servers that are to be asked what they own; any thread adds to it."""
        self._stream: torch.cuda.Stream | None = None
        """Of the last call."""
        self._made_of: object = None
        self._tasks = Tasks(caller.config.metrics.background_failed, caller.config.metrics.background_restarted)
        self._tables: Tables | None = None
        self._terms: Terms | None = None
        self.number = register(self)
        self.when_stale: Callable[[], object] | None = None
        """Renews them, before a call that no graph is captured with."""

    @property
    def is_stale(self) -> bool:
        """Whether calls go to servers that are not, or no longer, those to ask."""
        known = self._caller.membership.holdings.known
        return self._made_of != self._state(known) or any(lane.ended for lane in self._lanes)

    @property
    def on_gpu(self) -> frozenset[str]:
        """Addresses of the servers that reach the tensors in the GPU's memory."""
        return frozenset(lane.address for lane in self._lanes if lane.on_gpu)

    async def renew(self) -> None:
        """Ask whoever owns the experts now. Graphs that were captured go on with them, unless more servers than were
        known by then are to be asked.

        On the coordinator's event loop, while the device does no such calls. Raises `UnknownExpert`, `NotPermitted`
        where a server shares no memory, and like `connect`.
        """
        known = self._caller.membership.holdings.known
        made_of = self._state(known)
        terms = self._terms_of(known)
        chosen = torch.stack([self._chosen(known, layer) for layer in terms.layers])
        numbers = sorted(set(chosen.unique().tolist()))
        members = [self._caller.membership.members[number] for number in numbers]
        # Has the device's context made, and made this thread's.
        torch.zeros(1, device=self._device, dtype=torch.float32)
        lanes = await self._open_beside_or_after(members, terms)
        owners = torch.searchsorted(torch.tensor(numbers, device="cpu"), chosen).to(torch.int32)
        if self._terms is None:
            self._tasks.keep(self._watch, "watching stream-ordered calls")
        # New tables have room for all replicas: which of them are asked is drawn anew each time.
        former, is_new = await asyncio.to_thread(self._change, lanes, owners, terms, len(known.members), made_of)
        for lane in former:
            lane.close()
            if not is_new:
                lane.release_gpu()
        if not self._captured:
            self._let_go()
        # Kernels are compiled for the tables' sizes.
        if is_new and self._device.type == "cuda":
            self._warm_up()

    def __call__(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """Enqueue a call of [..., H] hidden states on the device's current stream: [..., H], into `out` if given.

        See `SyncCoordinator.on_stream`.
        """
        if self._is_captured():
            self._captured = True
        else:
            self.check()
            if self.when_stale is not None and self.is_stale:
                self.when_stale()
        out = checked(self._terms_now, layer, hidden, ids, weights, out)
        if hidden.numel():
            row = self._terms_now.layers.index(layer)
            self._launch(row, hidden.contiguous(), ids.contiguous(), weights.contiguous(), out)
            for lane in self._lanes:
                lane.nudge()
        return out

    def synchronize(self) -> None:
        """Wait until the device has done all that was enqueued."""
        self._wait_for_device()
        if self._device.type != "cuda":
            with self._launching:
                pass

    def take_error(self) -> ExpertdError | None:
        """What became of the first call that failed since this was asked last, as far as it is known by now."""
        error, self._untold = self._untold, None
        for lane in (*self._lanes, *self._retired):
            failure = lane.take_failure()
            if failure is None:
                continue
            error = error or failure.error
            if failure.is_of_server and lane in self._lanes and not lane.ended:
                self._failed.append((lane.member, failure.error))
        return error

    def report(self) -> None:
        """Have servers that failed asked what they own now. On the coordinator's event loop."""
        while self._failed:
            self._caller.membership.report(*self._failed.popleft())

    def check(self) -> None:
        """Raise it."""
        error = self.take_error()
        if error is not None:
            raise error

    async def close(self) -> None:
        """End all; what the device still waits for is released. Raises like `check`."""
        former, self._lanes = self._lanes, []
        self._retired += former
        for lane in self._retired:
            lane.close()
        await asyncio.to_thread(self.synchronize)
        await self._tasks.close()
        error = self.take_error()
        self._let_go()
        if error is not None:
            raise error

    def _wait_for_other_stream(self) -> None:
        """Calls share memory: those of one stream begin when those of another are over."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if self._stream is not None and self._stream != stream:
            stream.wait_stream(self._stream)
        self._stream = stream

    def _is_captured(self) -> bool:
        with on_device(self._device):
            return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _change(
        self, lanes: list[StreamLane], owners: Tensor, terms: Terms, servers: int, made_of: object
    ) -> tuple[list[StreamLane], bool]:
        """Have calls go to `lanes`, by the same tables if these have room, or by new ones for so many servers.

        The lanes that they went to, and whether the tables are new.
        """
        with self._launching:
            self._wait_for_device()
            self._untold = self.take_error()
            tables = self._tables
            if tables is None or not tables.fit(len(lanes), terms):
                # By the former ones nobody answers.
                if tables is not None and self._captured:
                    self._kept.append(tables)
                tables = Tables.empty(servers, terms)
            tables.renew(lanes, owners)
            self._wait_for_device()
            former, is_new = self._lanes, tables is not self._tables
            self._retired += former
            self._lanes, self._tables, self._terms, self._made_of = lanes, tables, terms, made_of
            return former, is_new

    def _wait_for_device(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _let_go(self) -> None:
        """Of lanes that nothing waits on any more."""
        for lane in self._retired:
            lane.close()
            lane.unpin()
        self._retired = []

    def _state(self, known: Known) -> object:
        return known.ownership, tuple(member.in_use for member in known.members)

    @property
    def _terms_now(self) -> Terms:
        if self._terms is None:
            raise RuntimeError("stream-ordered calls are not prepared; call prepare_stream first")
        return self._terms

    def _terms_of(self, known: Known) -> Terms:
        ownership, config = known.ownership, self._caller.config
        model = ownership.config
        reply_dtype = torch.float32 if config.reply_dtype == FP8 else config.reply_dtype
        return Terms(
            ownership.model_fingerprint,
            ownership.layers,
            self._sizes,
            model.hidden_size,
            model.num_experts_per_tok,
            model.n_routed_experts,
            config.hidden_dtype,
            reply_dtype,
            self._device,
            self._timeout,
        )

    def _chosen(self, known: Known, layer: int) -> Tensor:
        """[E] int64: number of the member that is asked for each expert."""
        chosen = self._caller.choose(known.ownership.model_fingerprint, layer, 1)[0]
        missing = (chosen == NOBODY).nonzero().flatten().tolist()
        if missing:
            raise Unavailable(
                f"layer {layer}: no server in use owns experts {missing[:8]}; start one, and prepare again"
            )
        return chosen

    async def _open_beside_or_after(self, members: list[Member], terms: Terms) -> list[StreamLane]:
        """Lanes to all. Those that calls go to now end before, where a server has no room for both."""
        try:
            return await self._open_all(members, terms)
        except Overloaded:
            if all(lane.ended for lane in self._lanes):
                raise
        for lane in self._lanes:
            lane.close()
        end = time.monotonic() + GIVEN_BACK_SECONDS
        while True:
            try:
                return await self._open_all(members, terms)
            except Overloaded:
                if time.monotonic() > end:
                    raise
            await asyncio.sleep(LOOK_SECONDS)

    async def _open_all(self, members: list[Member], terms: Terms) -> list[StreamLane]:
        opened = await asyncio.gather(*(self._open(member, terms) for member in members), return_exceptions=True)
        lanes = [one for one in opened if isinstance(one, StreamLane)]
        errors = [one for one in opened if isinstance(one, BaseException)]
        if errors:
            for lane in lanes:
                lane.close()
                lane.unpin()
            raise errors[0]
        return lanes

    async def _open(self, member: Member, terms: Terms) -> StreamLane:
        most = None if member.shard is None else member.shard.max_tokens_per_request
        if most is not None and terms.sizes[-1] > most:
            address = member.transport.address
            raise InvalidBatch(f"max_tokens is {terms.sizes[-1]}; {address} takes at most {most} a request")
        return await StreamLane.open(member, terms)

    def _warm_up(self) -> None:
        """Have kernels compiled and loaded, with calls that ask nobody, before a graph is captured."""
        terms = self._terms_now
        for tokens in {1, terms.sizes[-1]}:
            hidden = torch.zeros(tokens, terms.width, dtype=torch.bfloat16, device=self._device)
            ids = torch.full((tokens, terms.top_k), -1, device=self._device)
            weights = torch.zeros(tokens, terms.top_k, device=self._device, dtype=torch.float32)
            for kind in (torch.int32, torch.int64):
                self._launch(0, hidden, ids.to(kind), weights, torch.empty_like(hidden))
        self.synchronize()

    def _launch(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        """`layer` is its row in the tables."""
        assert self._tables is not None
        with self._launching, on_device(self._device):
            if not self._is_captured():
                self._wait_for_other_stream()
            enqueue(self._terms_now, self._tables, self._lanes, layer, hidden, ids, weights, out)

    async def _watch(self) -> None:
        while True:
            now = time.monotonic()
            self.report()
            for lane in (*self._lanes, *self._retired):
                error = lane.look(now)
                if error is not None and lane in self._lanes:
                    self._caller.membership.report(lane.member, error)
            await asyncio.sleep(LOOK_SECONDS)
