"""Single bits of calls in shared memory, flipped while their memory is nobody's turn to use: what comes of each."""

from __future__ import annotations

import hashlib
import random
import socket
from dataclasses import dataclass

import numpy as np
import torch

from expertd._native import CallbackExecutor, ClientLane, Engine, Mapping, Owner, StraightCall, Tally
from expertd.client.call.dispatch import Work, check_receipt
from expertd.client.transport.answer import outcome_of
from expertd.client.transport.native_call import Terms
from expertd.kernels.numerics.quantize import FP8, dequantize_activations
from expertd.proto.base.errors import ExpertdError
from expertd.proto.codec import DTYPE_CODES, REPLY_DTYPES, ExecuteResult
from expertd.proto.lane.layout import aligned, lay_out
from tests.support.fence.wrong import wrong
from tests.support.native.placements import placement_of

WIDTH, EXPERTS, TOP_K, LAYER = 128, 4, 2, 1
LAYERS = (LAYER, 3)
"""The other one is a bit away."""
SIZE, ROOM, ENTRIES = 1 << 18, 1100, 64
HARMLESS = "harmless"
Place = tuple[int, int]
"""Begin and end of bytes."""


class WrongAnswer(AssertionError):
    """A flipped bit became an answer."""

    def __init__(self, what: str) -> None:
        super().__init__(wrong(what))


def flip(memory: memoryview | bytearray, at: int, chance: random.Random) -> None:
    memory[at] ^= 1 << chance.randrange(8)


@dataclass(frozen=True, slots=True, eq=False)
class LaneCase:
    """A call whose hidden states are quantised right into the lane."""

    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    reply_dtype: torch.dtype
    traceparent: str

    @classmethod
    def make(cls, chance: random.Random) -> LaneCase:
        generator = torch.Generator().manual_seed(chance.getrandbits(32))
        tokens = chance.choice((1, 1, 3))
        ids = torch.rand(tokens, EXPERTS, generator=generator).argsort(dim=1)[:, :TOP_K].int()
        return cls(
            torch.randn(tokens, WIDTH, generator=generator).bfloat16(),
            ids,
            torch.rand(tokens, TOP_K, generator=generator),
            chance.choice(REPLY_DTYPES),
            chance.choice(("", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")),
        )


class FlippedLane:
    """Both ends of a lane, whose engine turns when it is told to.

    The sums are made of a digest of all that the engine gives to the device: whatever of it is altered, they differ.
    """

    def __init__(self) -> None:
        placement = placement_of(range(EXPERTS), LAYERS, fingerprint="f" * 64, epoch=12)
        self._tally = Tally(LAYERS, EXPERTS, (1.0,), (1.0,))
        self._engine = Engine(
            placement, max_batch_tokens=600, max_queued_tokens=4000, max_queued_bytes=1 << 30, tally=self._tally
        )
        self._executor = CallbackExecutor(2)
        self._engine.use(self._executor)
        self._engine.open()
        self._lane = ClientLane(SIZE, ENTRIES, spin_us=0)
        ours, theirs = socket.socketpair()
        with theirs:
            self._engine.add_lane(Mapping(self._lane.descriptor, SIZE), theirs.fileno(), "caller")
        self._lane.connect(ours.detach())
        self._owner = Owner(0, [self._lane], "f" * 64, 12, 1000, ROOM, True)
        self._posted = 0
        self.is_sound = True
        """Whether the next call finds it as if none had been altered."""

    def call(self, case: LaneCase, chance: random.Random | None, *, answer: bool, right: bytes = b"") -> str | bytes:
        """The sums of a call of which nothing is flipped, without a `chance`; or what came of a flip.

        It strikes the request, or the `answer`. Raises `WrongAnswer` for sums that are not `right`.
        """
        begun, request, reply = self._begin(case)
        if chance is not None and not answer:
            self._flip(request, chance)
        self._compute()
        if chance is not None and answer:
            self._flip(reply, chance)
        for _ in range(3):
            # Until an end of the lane is seen, too.
            self._lane.poll()
        outcome = self._outcome(begun, case)
        begun.drop()
        if chance is None:
            assert isinstance(outcome, bytes)
            return outcome
        if not isinstance(outcome, bytes):
            return outcome
        if outcome != right:
            raise WrongAnswer(f"{case}: a bit of the {'answer' if answer else 'request'} was flipped")
        return HARMLESS

    def _begin(self, case: LaneCase) -> tuple[StraightCall, list[Place], list[Place]]:
        """The call on its way, and where it and its answer lie in the segment."""
        tokens = len(case.hidden)
        terms = Terms(LAYER, torch.float8_e4m3fn, case.reply_dtype, 7, 1e6, [case.traceparent])
        begun = StraightCall.begin([self._owner], case.hidden, case.ids, case.weights, terms)
        assert begun is not None
        ((_, slot),) = begun.slots()
        layout = lay_out(0, None, tokens, WIDTH, TOP_K, torch.float8_e4m3fn, case.reply_dtype)
        start = slot - aligned(layout.end)
        length = int.from_bytes(self._memory[slot + 4 : slot + 8], "little")
        entry = 4096 + 16 * (self._posted % ENTRIES)
        self._posted += 1
        tensors = (layout.hidden, layout.hidden_scales, layout.expert_ids, layout.weights)
        written = [(start + part.start, start + part.stop) for part in tensors]
        sums = start + layout.partials.start, start + layout.partials.stop
        message = slot + 64, slot + 64 + length
        request = [(64, 68), (entry, entry + 16), (slot, slot + 12), message, *written]
        reply = aligned(message[1])
        return begun, request, [(slot, slot + 16), (reply, reply + ROOM), sums]

    @property
    def _memory(self) -> memoryview:
        return memoryview(self._lane.memory)

    def _flip(self, places: list[Place], chance: random.Random) -> None:
        """In one of the places, whatever its size: small ones are the more interesting."""
        flip(self._memory, chance.randrange(*chance.choice(places)), chance)

    def _compute(self) -> None:
        self._engine.turn(1)
        while self._tally.in_flight:
            batch = self._executor.fetch()
            assert batch is not None
            pairs = [0] * EXPERTS
            for hidden, scales, ids, weights, sums, tokens in batch.requests():
                digest = hashlib.blake2b(digest_size=8)
                for part in (hidden, scales or b"", ids, weights, bytes([batch.weights_key, batch.top_k, tokens])):
                    digest.update(part)
                values = np.random.default_rng(int.from_bytes(digest.digest())).standard_normal(
                    tokens * WIDTH, dtype=np.float32
                )
                is_whole = batch.sums_dtype == DTYPE_CODES[torch.float32]
                sums[:] = (values if is_whole else (values.view(np.uint32) >> 16).astype(np.uint16)).view(np.uint8).data
                counted = np.frombuffer(ids, np.int32)
                for expert, count in zip(*np.unique(counted[counted >= 0], return_counts=True), strict=True):
                    pairs[expert] += int(count)
            batch.finish(pairs, 0, 0, 0)
            self._engine.turn(1)

    def _outcome(self, begun: StraightCall, case: LaneCase) -> str | bytes:
        """Sums that a coordinator would take, or why it takes none."""
        out = torch.empty(case.hidden.shape, dtype=torch.float32 if case.reply_dtype == FP8 else case.reply_dtype)
        if begun.finish(0.0, out) is not None:
            return out.view(torch.uint8).numpy().tobytes()
        self.is_sound = not self._lane.ended
        (part,) = begun.parts()
        outcome = outcome_of("server", part, WIDTH, case.reply_dtype, 0.0, checked=True)
        if not isinstance(outcome, ExecuteResult):
            self.is_sound &= bool(part[5])
            return "the lane ended" if self._lane.ended else type(outcome).__name__
        try:
            check_receipt(Work(torch.arange(len(case.ids)), case.ids, case.weights), outcome.receipt, "server")
        except ExpertdError as error:
            return type(error).__name__
        scales = outcome.scales
        sums = outcome.partials if scales is None else dequantize_activations(outcome.partials, scales)
        return sums.contiguous().view(torch.uint8).numpy().tobytes()
