"""Calls that are work on the caller's CUDA stream: nothing of them waits for the host, so that graphs can hold them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertd.client.call.caller import Caller
from expertd.client.call.choice import NOBODY
from expertd.client.fleet.member import Member
from expertd.client.fleet.membership import Known
from expertd.client.stream import kernels
from expertd.client.stream.lane import StreamLane, Terms, slot_bytes
from expertd.client.stream.operator import register
from expertd.kernels.cutile.base.shape import SHAPE_CLASSES
from expertd.kernels.numerics.quantize import FP8
from expertd.proto.base.errors import ExpertdError, InvalidBatch, Unavailable, UnknownExpert
from expertd.proto.base.tasks import Tasks

LOOK_SECONDS = 0.05
"""Between two looks for calls that will not be answered."""
FEW_TOKENS = 256
"""Up to so many are given to every server whole, which takes less time than to find out what it wants of them."""
CHUNK = 512
COLUMNS = 1024
"""Tokens and columns that kernels take at once."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What kernels read, on the device; renewed in place, so that graphs that were captured go on."""

    places: Tensor
    """[S, C, FIELDS] int64, see `kernels`."""
    owners: Tensor
    """[layers, E] int32."""
    tails: Tensor
    """[S] int32."""
    sent: Tensor
    """[2 S + 1] int64."""
    verdicts: Tensor
    """[S + 1] int32."""
    chosen: Tensor
    """[S] int32."""
    rows: Tensor
    """[S * max_tokens] int32."""

    @classmethod
    def empty(cls, servers: int, terms: Terms) -> Tables:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=terms.device)

        return cls(
            zeros(servers, len(terms.sizes), kernels.FIELDS.value, dtype=torch.int64),
            zeros(len(terms.layers), terms.experts),
            zeros(servers),
            zeros(2 * servers + 1, dtype=torch.int64),
            zeros(servers + 1),
            zeros(servers),
            zeros(servers * terms.sizes[-1]),
        )

    @property
    def servers(self) -> int:
        return len(self.tails)

    def fit(self, servers: int, terms: Terms) -> bool:
        return servers <= self.servers and self.owners.shape == (len(terms.layers), terms.experts)

    def renew(self, lanes: list[StreamLane], owners: Tensor) -> None:
        """While the device does nothing with them."""
        places = torch.zeros(self.places.shape, dtype=torch.int64)
        places[: len(lanes)] = torch.from_numpy(np.stack([lane.places() for lane in lanes]))
        self.places.copy_(places)
        self.owners.copy_(owners)
        for counts in (self.tails, self.sent, self.verdicts):
            counts.zero_()


class StreamCalls:
    """Of one coordinator, from one device. They follow each other: on another stream, wait for the last one first."""

    def __init__(self, caller: Caller, device: torch.device, max_tokens: int, timeout: float) -> None:
        """Of at most `max_tokens` tokens; an answer may take `timeout` seconds. `renew` comes before the first call."""
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
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
        return self._made_of != self._state(self._caller.membership.known) or any(lane.ended for lane in self._lanes)

    @property
    def on_gpu(self) -> frozenset[str]:
        """Addresses of the servers that reach the tensors in the GPU's memory."""
        return frozenset(lane.address for lane in self._lanes if lane.on_gpu)

    async def renew(self) -> None:
        """Ask whoever owns the experts now. Graphs that were captured go on with them, unless they are more now.

        On the coordinator's event loop, while the device does no such calls. Raises `UnknownExpert`, `NotPermitted`
        where a server shares no memory, and like `connect`.
        """
        known = self._caller.membership.known
        made_of = self._state(known)
        terms = self._terms_of(known)
        chosen = torch.stack([self._chosen(known, layer) for layer in terms.layers])
        numbers = sorted(set(chosen.unique().tolist()))
        members = [self._caller.membership.members[number] for number in numbers]
        # Has the device's context made, and made this thread's.
        torch.zeros(1, device=self._device)
        lanes = await self._open_all(members, terms)
        owners = torch.searchsorted(torch.tensor(numbers), chosen).to(torch.int32)
        if self._terms is None:
            self._tasks.keep(self._watch, "watching stream-ordered calls")
        await asyncio.to_thread(self.synchronize)
        former = self._retire()
        if self._tables is None or not self._tables.fit(len(lanes), terms):
            # Graphs that were captured go on reading the former ones, by which nobody answers.
            self._tables = Tables.empty(len(lanes), terms)
        else:
            for lane in former:
                lane.release_gpu()
        self._tables.renew(lanes, owners)
        self._lanes, self._made_of, self._terms = lanes, made_of, terms
        if self._device.type == "cuda":
            self._warm_up()

    def __call__(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """Enqueue a call of [..., H] hidden states on the device's current stream: [..., H], into `out` if given.

        See `SyncCoordinator.on_stream`.
        """
        if not self._is_captured():
            self.check()
            if self.when_stale is not None and self.is_stale:
                self.when_stale()
        out = self._check(layer, hidden, ids, weights, out)
        if hidden.numel():
            row = self._terms_now.layers.index(layer)
            self._enqueue(row, hidden.contiguous(), ids.contiguous(), weights.contiguous(), out)
            for lane in self._lanes:
                lane.nudge()
        return out

    def synchronize(self) -> None:
        """Wait until the device has done all that was enqueued."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def take_error(self) -> ExpertdError | None:
        """What became of the first call that failed since this was asked last, as far as it is known by now."""
        errors = [error for lane in (*self._lanes, *self._retired) if (error := lane.take_error())]
        return errors[0] if errors else None

    def check(self) -> None:
        """Raise it."""
        error = self.take_error()
        if error is not None:
            raise error

    async def close(self) -> None:
        """End all; what the device still waits for is released. Raises like `check`."""
        self._retire()
        await asyncio.to_thread(self.synchronize)
        await self._tasks.close()
        for lane in self._retired:
            lane.unpin()
        self.check()

    def _is_captured(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _retire(self) -> list[StreamLane]:
        """The lanes so far, whose memory of the host graphs may yet wait on."""
        former, self._lanes = self._lanes, []
        self._retired += former
        for lane in former:
            lane.close()
        return former

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
            weights = torch.zeros(tokens, terms.top_k, device=self._device)
            for kind in (torch.int32, torch.int64):
                self._enqueue(0, hidden, ids.to(kind), weights, torch.empty_like(hidden))
        self.synchronize()

    async def _watch(self) -> None:
        while True:
            now = time.monotonic()
            for lane in (*self._lanes, *self._retired):
                error = lane.look(now)
                if error is not None and lane in self._lanes:
                    self._caller.membership.report(lane.member, error)
            await asyncio.sleep(LOOK_SECONDS)

    def _check(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor | None) -> Tensor:
        terms = self._terms_now
        if layer not in terms.layers:
            raise UnknownExpert(f"layer {layer} is on no server; layers served: {list(terms.layers)}")
        for name, tensor in (("hidden", hidden), ("topk_ids", ids), ("topk_weights", weights)):
            if tensor.device != self._device:
                raise InvalidBatch(
                    f"{name} is on {tensor.device}; stream-ordered calls were prepared on {self._device}"
                )
        if hidden.dim() < 1 or hidden.shape[-1] != terms.width:
            raise InvalidBatch(f"hidden has the shape {list(hidden.shape)}; it must be [..., {terms.width}]")
        if hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise InvalidBatch(f"hidden is {hidden.dtype}; it must be bfloat16, float16 or float32")
        tokens = hidden.numel() // terms.width
        if tokens > terms.sizes[-1]:
            raise InvalidBatch(f"hidden has {tokens} tokens; stream-ordered calls were prepared for {terms.sizes[-1]}")
        _check_choices(ids, weights, tokens, terms.top_k)
        if out is None:
            return torch.empty_like(hidden, memory_format=torch.contiguous_format)
        if out.shape != hidden.shape or out.device != self._device or not out.is_contiguous():
            raise InvalidBatch(f"out must be contiguous, of the shape {list(hidden.shape)}, on {self._device}")
        return out

    def _enqueue(self, layer: int, hidden: Tensor, ids: Tensor, weights: Tensor, out: Tensor) -> None:
        """`layer` is its row in the tables."""
        terms, tables = self._terms_now, self._tables
        assert tables is not None
        top_k, tokens = ids.shape[-1], hidden.numel() // terms.width
        servers, classes, simulated = tables.servers, len(terms.sizes), self._device.type == "cpu"
        compact = servers > 1 and tokens > FEW_TOKENS
        size = next(index for index, size in enumerate(terms.sizes) if tokens <= size)
        wide = _power_of_two(top_k)
        places, owners, rows, chosen = tables.places, tables.owners, tables.rows, tables.chosen
        if compact:
            kernels.compact[(servers,)](
                ids, owners, places, rows, chosen, tokens, layer, top_k, terms.experts, classes, wide, CHUNK
            )
        groups = -(-(tokens if compact else terms.sizes[size]) // kernels.GROUP.value)
        kernels.dispatch[(groups + tokens, servers)](
            hidden,
            ids,
            weights,
            owners,
            places,
            rows,
            chosen,
            tables.sent,
            tokens,
            groups,
            layer,
            size,
            top_k,
            terms.experts,
            terms.width,
            servers,
            classes,
            wide,
            _power_of_two(terms.width // kernels.BLOCK.value),
            terms.hidden_dtype == FP8,
            compact,
            num_warps=8,
        )
        posted = places, tables.tails, chosen, tables.sent, tables.verdicts, layer, size, slot_bytes(terms)
        kernels.post[(servers,)](*posted, servers, classes, compact, simulated, num_warps=1)
        for lane in self._lanes:
            lane.wait(self._device)
        kernels.settle[(servers,)](*posted, classes, compact, simulated, num_warps=1)
        kernels.combine[(tokens, -(-terms.width // COLUMNS))](
            out,
            places,
            rows,
            chosen,
            tables.verdicts,
            tokens,
            size,
            terms.width,
            servers,
            classes,
            COLUMNS,
            terms.reply_dtype == torch.float32,
            compact,
        )


def _check_choices(ids: Tensor, weights: Tensor, tokens: int, top_k: int) -> None:
    for name, tensor in (("topk_ids", ids), ("topk_weights", weights)):
        if tensor.dim() < 1 or tensor.numel() != tokens * top_k or tensor.shape[-1] != top_k:
            raise InvalidBatch(f"{name} has the shape {list(tensor.shape)}; {tokens} tokens take [..., {top_k}]")
    if ids.dtype not in (torch.int32, torch.int64):
        raise InvalidBatch(f"topk_ids is {ids.dtype}; it must be int32 or int64")
    if not weights.is_floating_point():
        raise InvalidBatch(f"topk_weights is {weights.dtype}; it must be a float dtype")


def _power_of_two(number: int) -> int:
    """The smallest that is not less."""
    return 1 << (number - 1).bit_length()
