"""The straight way of a call: from hidden states to sums in native code, while nothing is wrong.

Between them are the lanes of shared memory, or messages that transports send. What is not so common goes the long way
(`failover`), and so does what went wrong on the straight one, part by part.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from expertd import _native
from expertd.client.call.caller import Caller, Server, Superseded
from expertd.client.call.dispatch import Dispatch, check_receipt
from expertd.client.call.result import Answer, ServerReport, by_server
from expertd.client.fleet.member import Member
from expertd.client.telemetry.tracing import AttemptSpans
from expertd.client.transport.answer import outcome_of
from expertd.client.transport.native_call import Terms, Watch, kept, stays
from expertd.kernels.memory.results import empty
from expertd.kernels.numerics.tokens import FORMATS
from expertd.proto.base.errors import Cancelled, ExpertdError, ServerFault, Unavailable
from expertd.proto.codec import ExecuteResult, StageTimings

GIVEN_UP = Cancelled("the call was given up")
Part = tuple[Member, Dispatch]
Stages = tuple[float, float, float, float, float]
Soon = Callable[[Callable[[], object]], object]
"""Has the event loop call something."""
Outcome = Answer | ExpertdError | None
"""What became of a part of a call; None when it was never sent."""


class StraightCall:
    """Parts of a call on their way. After `close`, or at the end of a `with` block, nothing else may be asked of it."""

    def __init__(
        self,
        caller: Caller,
        layer: int,
        call: _native.StraightCall,
        servers: Sequence[Server],
        shape: torch.Size,
        timeout: float,
        attempts: AttemptSpans | None,
        soon: Soon | None,
    ) -> None:
        self._call = call
        self._servers = {server.member.number: server for server in servers}
        self._soon = soon or at_once
        self._watch: Watch | None = None
        self._closed = self._given_up = False
        self._answers: list[asyncio.Future[bytes]] = []
        self._errors: dict[int, ExpertdError] = {}
        self._messages = call.messages
        parts = [(self._servers[number].member, tokens) for number, tokens in call.planned]
        self._tokens = parts
        self._giving_up = [
            (member, partial(self._lose, member)) for member in {member.number: member for member, _ in parts}.values()
        ]
        for member, give_up in self._giving_up:
            member.under_way.add(give_up)
        if self._messages:
            self._soon(self._exchange)
        # Here servers compute already: what can be done before their answers is done now.
        config = caller.config
        self._shape = shape
        self._out = None if call.in_place else empty(shape, config.output_dtype)
        self._rows = None if self._out is None else self._out.view(-1, shape[-1])
        self._caller = caller
        self._layer = layer
        self._timeout = self._left = timeout
        self._attempts = attempts
        self._counted = False
        # Nor does the caller wait for what is counted of its answers.
        self._account = config.metrics.later if soon is None else at_once
        self._begun = time.perf_counter()
        caller.count(parts, 1)
        caller.budget.earn(len(parts))
        config.metrics.fan_out(len(self._giving_up))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Cancel what has no answer; do nothing when called again."""
        if self._closed:
            return
        self._closed = True
        if self._watch is not None:
            self._watch.end()
        for member, give_up in self._giving_up:
            member.under_way.discard(give_up)
        if self._messages and not all(answer.done() for answer in self._answers):
            # Once the loop is closed, nothing is sent any more.
            with contextlib.suppress(RuntimeError):
                self._soon(partial(_cancel, self._answers))
        for member, tokens in self._tokens:
            if not self._counted:
                self._count(member, "cancelled", time.perf_counter() - self._begun)
            self._end(member, tokens, GIVEN_UP)
        self._call.drop()
        self._caller.count(self._tokens, -1)
        # Those that give up refer to this, and would keep its memory until Python looks for such rings.
        self._giving_up, self._messages, self._answers = [], [], []
        self._out = self._rows = None

    def give_up(self) -> None:
        """Have the thread that is in `sums` wait no longer, and raise `Cancelled`. Any thread."""
        self._given_up = True
        for member, _ in self._giving_up:
            self._call.lose(member.number)

    async def answered(self) -> None:
        """Wait on the event loop, which is that of the lanes, at most as long as an attempt may take."""
        segments = (segment for server in self._servers.values() for segment in server.segments)
        self._watch = Watch(self._call, segments)
        await self._watch.wait(self._timeout)
        self._left = 0.0

    def sums(self) -> tuple[Tensor, tuple[ServerReport, ...]] | None:
        """[..., H] of the output dtype; None when a part has failed.

        What is not `answered` yet it waits for on this thread, at most as long as an attempt may take. Raises
        `Cancelled` once it is given up, unless it has its answers.
        """
        out = self._out
        parts = self._call.finish(self._left, self._rows)
        self._counted = parts is not None
        if parts is None:
            if self._given_up:
                raise GIVEN_UP.again()
            return None
        if out is None:
            out = kept(self._call, self._shape, self._caller.config.output_dtype)
        for member, tokens in self._tokens:
            self._end(member, tokens)
        self._account(partial(self._answered, parts))
        return out, by_server(self._report(*part) for part in parts)

    def outcomes(self) -> list[tuple[Part, Outcome]]:
        """What became of each part, in a copy of its own."""
        self._counted = True
        outcomes = [self._outcome(*part) for part in enumerate(self._call.parts())]
        for (member, dispatch), outcome in outcomes:
            if isinstance(outcome, Answer):
                self._count(member, "ok", outcome.round_trip)
                self._end(member, len(dispatch.tokens))
            elif outcome is not None:
                self._count(member, outcome.code.name.lower(), time.perf_counter() - self._begun)
                self._end(member, len(dispatch.tokens), outcome)
        return outcomes

    def _exchange(self) -> None:
        """By the event loop, as what follows."""
        answers = self._answers
        for part, number, request_id, message in () if self._closed else self._messages:
            exchange = self._servers[number].member.transport.exchange(request_id, message)
            answer = asyncio.ensure_future(exchange)
            answer.add_done_callback(partial(self._take, part))
            answers.append(answer)
        if self._closed:
            _cancel(answers)

    def _take(self, part: int, answer: asyncio.Future[bytes]) -> None:
        error = Cancelled("its sending was cancelled") if answer.cancelled() else answer.exception()
        if error is not None:
            self._errors[part] = error if isinstance(error, ExpertdError) else ServerFault(repr(error))
        self._call.answer(part, answer.result() if error is None else None)
        if self._watch is not None and not self._closed:
            self._watch.look()

    def _lose(self, member: Member) -> None:
        """By the event loop: `member` is silent."""
        self._call.lose(member.number)
        if self._watch is not None:
            self._watch.look()

    def _report(self, number: int, tokens: int, pairs: int, seconds: float, stages: Stages) -> ServerReport:
        address = self._servers[number].member.transport.address
        return ServerReport(address, tokens, pairs, seconds, StageTimings(*stages))

    def _answered(self, parts: Iterable[tuple[int, int, int, float, Stages]]) -> None:
        for number, tokens, pairs, seconds, _ in parts:
            member = self._servers[number].member
            member.transport.heard = time.monotonic()
            member.answered(self._layer, tokens, pairs, seconds)
            self._count(member, "ok", seconds)

    def _count(self, member: Member, outcome: str, seconds: float) -> None:
        transport = "shared_memory" if self._servers[member.number].segments else "grpc"
        trace = "" if self._attempts is None else self._attempts.trace
        self._caller.config.metrics.attempts.ended(member.transport.address, transport, outcome, seconds, trace)

    def _end(self, member: Member, tokens: int, error: ExpertdError | None = None) -> None:
        if self._attempts is not None:
            self._attempts.end(member.transport.address, tokens, error)

    def _outcome(self, index: int, part: _native.CallPart) -> tuple[Part, Outcome]:
        number, tokens, ids, weights, _, _, _, seconds, _ = part
        server = self._servers[number]
        member, count = server.member, len(tokens) // 8
        dispatch = Dispatch(
            torch.frombuffer(bytearray(tokens), dtype=torch.int64),
            torch.frombuffer(bytearray(ids), dtype=torch.int32).reshape(count, -1),
            torch.frombuffer(bytearray(weights), dtype=torch.float32).reshape(count, -1),
            server=number,
        )
        address, dtype = member.transport.address, self._caller.config.reply_dtype
        result = self._errors.get(index) or outcome_of(
            address, part, self._shape[-1], dtype, self._timeout, checked=server.owner.checked
        )
        if isinstance(result, Unavailable) and not member.in_use and member.why_not is not None:
            return (member, dispatch), member.why_not.again()
        if not isinstance(result, ExecuteResult):
            return (member, dispatch), result
        try:
            check_receipt(dispatch, result.receipt, address)
        except ExpertdError as error:
            return (member, dispatch), error
        return (member, dispatch), Answer(dispatch, result, address, seconds)


def _cancel(answers: Sequence[asyncio.Future[bytes]]) -> None:
    for answer in answers:
        answer.cancel()


def at_once(function: Callable[[], object]) -> None:
    """`Soon`, for callers on the event loop."""
    function()


def begin(
    caller: Caller,
    fingerprint: str,
    layer: int,
    tokens: Tensor,
    ids: Tensor,
    weights: Tensor,
    shape: torch.Size,
    deadline: float,
    soon: Soon | None,
) -> StraightCall | None:
    """Send all parts of a call of [T, H] hidden states on the CPU, [T, k] ids and weights; None for the long way.

    Experts are those of the weights with this `fingerprint`. `shape` is that of the output. With `soon`, which has the
    lanes' event loop send what lanes do not carry, the call is waited for on any thread; without, this is called on
    that loop, and the call is `answered` there. Arguments that are wrong are for the long way to find.
    """
    config, top_k = caller.config, ids.shape[1]
    common = (
        tokens.dtype in FORMATS
        and not tokens.is_cuda
        and config.output_dtype in (torch.bfloat16, torch.float32)
        and caller.lateness is None
        and ids.dtype in (torch.int32, torch.int64)
        and ids.shape == weights.shape
        and top_k <= caller.membership.holdings.ownership.config.num_experts_per_tok
    )
    timeout = min(config.attempt_timeout, deadline - time.monotonic())
    try:
        servers = caller.servers(fingerprint, tokens.shape[1]) if common and timeout > 0 else []
        if not servers:
            return None
        chosen = caller.choose(fingerprint, layer, len(tokens))
    except Superseded:
        return None
    ids, weights, tokens = ids.contiguous(), weights.float().contiguous(), tokens.contiguous()
    addresses = [server.member.transport.address for server in servers]
    attempts = None if config.tracer is None else AttemptSpans(config.tracer, addresses)
    traceparents = [] if attempts is None else attempts.traceparents
    terms = Terms(layer, config.hidden_dtype, config.reply_dtype, next(caller.request_ids), timeout, traceparents)
    owners = [server.owner for server in servers]
    as_asked = config.shared_results and config.reply_dtype == config.output_dtype
    in_place = as_asked and stays(tokens, config.reply_dtype)
    call = _native.StraightCall.begin(
        owners, tokens, ids, weights, terms, chosen=chosen, looped=soon is None, in_place=in_place
    )
    if call is None:
        return None
    return StraightCall(caller, layer, call, servers, shape, timeout, attempts, soon)
