"""Batching, bounds and order, with a backend whose progress the test controls."""

import asyncio
import dataclasses
import gc
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import pytest
import pytest_asyncio
import torch

from expertd._native import Engine, Tally
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics.backend import Computed, LayerWeights, Partials, TokenBatch, Underway
from expertd.kernels.torch.backend import Finished, TorchBackend
from expertd.proto import codec
from expertd.proto.base.errors import DeadlineExceeded, Overloaded, ServerFault, Unavailable
from expertd.proto.codec import ExecuteResult, ShardInfo
from expertd.server.rpc.executor import EngineExecutor, error_of
from expertd.server.rpc.incoming import Incoming
from expertd.server.scheduling.device import DeviceOwner
from expertd.server.scheduling.shard import Shard
from tests.support.model.queue import SMALL_TOKENS, Next, may_start, next_batch
from tests.support.serving import call_of, matrices_of, random_batch, random_weights

EXPERTS, HIDDEN, TOP_K = 4, 128, 2
MAX_BYTES = 1 << 20
WEIGHTS = random_weights(EXPERTS, HIDDEN, 128)


class GatedBackend(TorchBackend):
    """Computes for real, but only after the test opened the gate; remembers the size of every device batch."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.batches: list[tuple[int, int]] = []
        self.threads: set[str] = set()

    def execute(self, layer: int, batch: TokenBatch) -> Partials:
        self.gate.wait(10)
        self.batches.append((layer, batch.num_tokens))
        self.threads.add(threading.current_thread().name)
        return super().execute(layer, batch)


class BrokenBackend(TorchBackend):
    def execute(self, layer: int, batch: TokenBatch) -> Partials:
        raise RuntimeError("CUDA error: unspecified launch failure")


class MiscountingBackend(TorchBackend):
    """Loses one pair of expert 0."""

    def execute(self, layer: int, batch: TokenBatch) -> Partials:
        partials = super().execute(layer, batch)
        pairs = partials.pairs.clone()
        pairs[0] -= 1
        return replace(partials, pairs=pairs)


class OverlappingBackend(TorchBackend):
    """Lets two batches be under way; a batch ends when the test says so."""

    depth = 2

    def __init__(self) -> None:
        super().__init__()
        self.started: list[int] = []
        self.gates = [threading.Event() for _ in range(8)]

    def submit(self, layer: int, requests: Sequence[TokenBatch], reply_dtype: torch.dtype) -> "GatedBatch":
        self.started.append(sum(request.num_tokens for request in requests))
        return GatedBatch(super().submit(layer, requests, reply_dtype).computed, self.gates[len(self.started) - 1])


@dataclass(frozen=True)
class GatedBatch(Finished):
    gate: threading.Event

    def result(self) -> Computed:
        self.gate.wait(10)
        return self.computed


def info() -> ShardInfo:
    """Nobody asks for it here."""
    names = (field.name for field in dataclasses.fields(ShardInfo) if field.default is dataclasses.MISSING)
    return ShardInfo(**dict.fromkeys(names))  # type: ignore[arg-type]


class Rig:
    """An engine with its executor on this loop, and the threads that compute with `backend`."""

    def __init__(self, backend: TorchBackend, max_batch_tokens: int, max_queued_tokens: int) -> None:
        config = MoeConfig(
            hidden_size=HIDDEN,
            moe_intermediate_size=128,
            n_routed_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            n_group=1,
            topk_group=1,
            num_hidden_layers=3,
            first_k_dense_replace=1,
        )
        self.shard = Shard(config, "model", 1, dict.fromkeys((1, 2), tuple(range(EXPERTS))))
        self.device = DeviceOwner(backend)
        self.engine = Engine(
            self.shard.placement(10 * max_queued_tokens),
            max_batch_tokens=max_batch_tokens,
            max_queued_tokens=max_queued_tokens,
            max_queued_bytes=MAX_BYTES,
            tally=Tally((1, 2), EXPERTS, (1.0,), (1.0,)),
        )
        self.engine.use(self.device.batches)
        self.executor = EngineExecutor(self.engine, info())

    @property
    def queued_tokens(self) -> int:
        return self.engine.queued_tokens

    def check_room(self, tokens: int, num_bytes: int) -> None:
        refusal = self.engine.check_room(tokens, num_bytes)
        if refusal is not None:
            raise error_of(refusal)

    async def execute(self, layer: int, batch: TokenBatch, timeout: float | None) -> ExecuteResult:
        one = call_of(batch, request_id=1, layer=layer, timeout=timeout)
        call = self.executor.submit(Incoming(codec.encode_call(one), "caller"))
        try:
            response = await asyncio.shield(call.answer)
        except asyncio.CancelledError:
            call.cancel()
            await asyncio.wait((call.answer,))
            raise
        return codec.decode_result(codec.parse_response(response), batch.num_tokens, HIDDEN, torch.float32)


@pytest_asyncio.fixture
async def gated() -> AsyncIterator[tuple[GatedBackend, Rig]]:
    backend = GatedBackend()
    async for rig in serve(backend):
        yield backend, rig
        backend.gate.set()


async def serve(backend: TorchBackend, max_batch_tokens: int = 16, max_queued_tokens: int = 20) -> AsyncIterator[Rig]:
    for layer in (1, 2):
        backend.load_layer(layer, WEIGHTS)
    rig = Rig(backend, max_batch_tokens, max_queued_tokens)
    rig.device.start()
    rig.executor.start()
    rig.engine.start()
    rig.engine.open()
    yield rig
    rig.executor.stop()
    rig.device.stop()
    await asyncio.to_thread(rig.engine.stop)


def batch(tokens: int, seed: int = 0) -> TokenBatch:
    return random_batch(tokens, HIDDEN, EXPERTS, TOP_K, seed=seed)


def submit(rig: Rig, layer: int, tokens: TokenBatch, timeout: float | None = None) -> asyncio.Task[ExecuteResult]:
    return asyncio.create_task(rig.execute(layer, tokens, timeout))


async def settle() -> None:
    """Until the engine and the device's threads have done what they can."""
    await asyncio.sleep(0.02)


async def test_what_waits_for_a_layer_becomes_one_batch_and_each_gets_its_own_result(
    gated: tuple[GatedBackend, Rig],
) -> None:
    backend, rig = gated
    first = submit(rig, 1, batch(1))
    await settle()
    batches = [batch(tokens, seed=tokens) for tokens in (3, 2, 4)]
    waiting = [submit(rig, layer, tokens) for layer, tokens in zip((1, 2, 1), batches, strict=True)]
    await settle()
    assert rig.queued_tokens == 9
    backend.gate.set()
    results = await asyncio.gather(first, *waiting)
    assert backend.batches == [(1, 1), (1, 7), (2, 2)]
    assert backend.threads == {"device-owner"}
    assert rig.queued_tokens == 0
    for layer, tokens, result in zip((1, 2, 1), batches, results[1:], strict=True):
        alone = TorchBackend.execute(backend, layer, tokens)
        assert torch.equal(result.partials, alone.sums)
        assert dict(result.receipt) == {expert: count for expert, count in enumerate(alone.pairs.tolist()) if count}
        assert result.timings.queue > 0


async def test_a_full_queue_refuses_with_its_numbers_and_accepts_again_later(
    gated: tuple[GatedBackend, Rig],
) -> None:
    backend, rig = gated
    running = submit(rig, 1, batch(1))
    await settle()
    queued = submit(rig, 1, batch(16))
    await settle()
    with pytest.raises(Overloaded, match="16 tokens are queued and num_tokens is 5; at most 20 may wait"):
        await submit(rig, 1, batch(5))
    fits = submit(rig, 1, batch(4))
    backend.gate.set()
    await asyncio.gather(running, queued, fits)
    await submit(rig, 1, batch(16))


async def test_a_full_queue_says_when_to_come_back_once_it_knows_the_devices_pace(
    gated: tuple[GatedBackend, Rig],
) -> None:
    backend, rig = gated
    backend.gate.set()

    async def refusal() -> Overloaded:
        with pytest.raises(Overloaded) as caught:
            rig.check_room(21, 1)
        return caught.value

    assert (await refusal()).retry_after is None
    await submit(rig, 1, batch(16))
    known = (await refusal()).retry_after
    assert known is not None
    assert 0.001 <= known <= 5.0
    backend.gate.clear()
    waiting = [submit(rig, 1, batch(16))]
    # The device has it, and the queue room for another one.
    await settle()
    waiting.append(submit(rig, 1, batch(16)))
    await settle()
    fuller = (await refusal()).retry_after
    assert fuller is not None
    assert fuller >= known
    backend.gate.set()
    await asyncio.gather(*waiting)


async def test_bytes_that_wait_are_bounded_too(gated: tuple[GatedBackend, Rig]) -> None:
    backend, rig = gated
    running = submit(rig, 1, batch(1))
    await settle()
    queued = submit(rig, 1, batch(4))
    await settle()
    waiting = batch(4).num_bytes
    assert waiting == 4 * (HIDDEN + 4 * HIDDEN // 128 + 8 * TOP_K)
    rig.check_room(1, MAX_BYTES - waiting)
    with pytest.raises(Overloaded, match=f"{waiting} bytes are queued and the request's tensors have .* at most"):
        rig.check_room(1, MAX_BYTES - waiting + 1)
    backend.gate.set()
    await asyncio.gather(running, queued)
    rig.check_room(1, MAX_BYTES)


async def test_cancelled_and_expired_requests_never_reach_the_device(gated: tuple[GatedBackend, Rig]) -> None:
    backend, rig = gated
    running = submit(rig, 1, batch(1))
    await settle()
    cancelled = submit(rig, 1, batch(2))
    expired = submit(rig, 2, batch(3), timeout=0.01)
    kept = submit(rig, 2, batch(4), timeout=60)
    await settle()
    cancelled.cancel()
    await asyncio.sleep(0.02)
    backend.gate.set()
    await asyncio.gather(running, kept)
    with pytest.raises(DeadlineExceeded, match=r"ran out after 0\.0\d+ s in the queue"):
        await expired
    assert backend.batches == [(1, 1), (2, 4)]
    assert rig.queued_tokens == 0


async def test_what_is_cancelled_in_the_queue_makes_room_at_once(gated: tuple[GatedBackend, Rig]) -> None:
    backend, rig = gated
    running = submit(rig, 1, batch(1))
    await settle()
    cancelled = submit(rig, 1, batch(20))
    await settle()
    with pytest.raises(Overloaded):
        rig.check_room(1, 0)
    cancelled.cancel()
    await settle()
    assert cancelled.cancelled()
    rig.check_room(20, MAX_BYTES)
    backend.gate.set()
    await running
    assert backend.batches == [(1, 1)]


async def test_what_is_cancelled_under_way_ends_when_the_device_no_longer_uses_its_tensors(
    gated: tuple[GatedBackend, Rig],
) -> None:
    backend, rig = gated
    running = submit(rig, 1, batch(1))
    await settle()
    running.cancel()
    await asyncio.sleep(0.1)
    assert not running.done()
    backend.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert backend.batches == [(1, 1)]


async def test_an_error_that_nobody_waits_for_any_more_is_no_complaint(
    gated: tuple[GatedBackend, Rig], caplog: pytest.LogCaptureFixture
) -> None:
    backend, rig = gated

    def fail(*_: object) -> Underway:
        backend.gate.wait(10)
        raise RuntimeError("CUDA error")

    rig.device.submit = fail
    running = submit(rig, 1, batch(1))
    await settle()
    running.cancel()
    await settle()
    backend.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    del running
    await asyncio.sleep(0.05)
    gc.collect()
    assert not caplog.records


async def test_large_batches_overlap_and_small_ones_grow() -> None:
    backend = OverlappingBackend()
    large = SMALL_TOKENS
    async for rig in serve(backend, max_batch_tokens=large, max_queued_tokens=10 * large):
        sizes = (large, large, large, 1, 2)
        tasks = [submit(rig, 1, batch(tokens, seed=number)) for number, tokens in enumerate(sizes)]
        await settle()
        assert rig.queued_tokens == large + 3, "two are under way"
        for gate in backend.gates:
            await asyncio.sleep(0.01)
            gate.set()
        results = await asyncio.gather(*tasks)
        assert backend.started == [large, large, large, 3]
        for number, (tokens, result) in enumerate(zip(sizes, results, strict=True)):
            assert torch.equal(result.partials, backend.execute(1, batch(tokens, seed=number)).sums)


@pytest.mark.parametrize(
    ("under_way", "waiting", "depth", "expected"),
    [
        ([], 1, 1, True),
        ([1], SMALL_TOKENS, 1, False),
        ([1], SMALL_TOKENS - 1, 2, False),
        ([1], SMALL_TOKENS, 2, True),
        ([SMALL_TOKENS], 1, 2, True),
        ([SMALL_TOKENS, 1], SMALL_TOKENS, 2, False),
    ],
    ids=["idle", "no overlap", "two small ones", "large behind small", "small behind large", "as many as may be"],
)
def test_when_the_next_batch_starts(under_way: list[int], waiting: int, depth: int, expected: bool) -> None:
    assert may_start(under_way, waiting, depth) is expected


@pytest.mark.parametrize(
    ("under_way", "express_is_free", "large", "small", "expected"),
    [
        ([], True, 0, 1, Next.EXPRESS),
        ([SMALL_TOKENS] * 2, True, SMALL_TOKENS, 1, Next.EXPRESS),
        ([SMALL_TOKENS] * 2, False, SMALL_TOKENS, 1, None),
        ([SMALL_TOKENS], True, 0, SMALL_TOKENS, Next.SMALL),
        ([SMALL_TOKENS], True, SMALL_TOKENS, 1, Next.EXPRESS),
        ([SMALL_TOKENS], False, SMALL_TOKENS, SMALL_TOKENS, Next.LARGE),
        ([SMALL_TOKENS], False, 0, SMALL_TOKENS - 1, None),
        ([], False, 0, SMALL_TOKENS, Next.SMALL),
        ([SMALL_TOKENS] * 2, True, 0, 2 * SMALL_TOKENS, Next.EXPRESS),
    ],
    ids=[
        "idle",
        "beside as many as may be",
        "one small batch alone",
        "many small ones in one batch",
        "small ones before a large one",
        "a large one before many small ones",
        "two small ones",
        "many small ones beside a small one",
        "many small ones without another place",
    ],
)
def test_what_starts_where_small_requests_wait_apart(
    under_way: list[int], express_is_free: bool, large: int, small: int, expected: Next | None
) -> None:
    assert next_batch(under_way, express_is_free, large, small, depth=2) is expected


async def test_closing_refuses_new_requests_and_answers_accepted_ones(gated: tuple[GatedBackend, Rig]) -> None:
    backend, rig = gated
    accepted = [submit(rig, 1, batch(1)), submit(rig, 1, batch(2))]
    await settle()
    rig.engine.close("draining", refusing=False)
    with pytest.raises(Unavailable, match="draining"):
        rig.executor.check_open()
    rig.check_room(1, 1)
    rig.engine.close("draining")
    with pytest.raises(Unavailable, match="draining"):
        await submit(rig, 1, batch(1))
    backend.gate.set()
    assert [result.partials.shape[0] for result in await asyncio.gather(*accepted)] == [1, 2]


@pytest.mark.parametrize(
    ("backend", "complaint"),
    [
        (BrokenBackend(), "the device failed: RuntimeError: CUDA error: unspecified launch failure"),
        (MiscountingBackend(), r"layer 1: the device computed pairs \[.*\], not \[.*\]"),
    ],
    ids=["device error", "lost pair"],
)
async def test_a_failing_device_is_answered_to_everyone_who_waits(backend: TorchBackend, complaint: str) -> None:
    async for rig in serve(backend):
        tasks = [submit(rig, 1, random_batch(4, HIDDEN, EXPERTS, TOP_K, absent=0.0)) for _ in range(3)]
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        for error in errors:
            with pytest.raises(ServerFault, match=complaint):
                raise error if isinstance(error, Exception) else AssertionError("it was answered")
        assert len(set(map(id, errors))) == 3, "one exception each"


async def test_the_self_check_accepts_good_and_refuses_mutated_weights() -> None:
    from expertd.server.scheduling.selfcheck import SelfCheckFailed, self_check

    def check(loaded: LayerWeights) -> float:
        backend = TorchBackend()
        backend.load_layer(1, loaded)
        return self_check(backend, 1, {local: matrices_of(WEIGHTS, local) for local in range(WEIGHTS.num_experts)})

    assert check(WEIGHTS) < 1e-6
    swapped = WEIGHTS.down.view(torch.uint8).roll(1, dims=0).view(WEIGHTS.down.dtype)
    mutations = [
        replace(WEIGHTS, up_gate_scales=WEIGHTS.up_gate_scales * 1.05),
        replace(WEIGHTS, down_scales=-WEIGHTS.down_scales),
        replace(WEIGHTS, down_scales=WEIGHTS.down_scales * 0),
        replace(WEIGHTS, down=swapped),
        replace(WEIGHTS, down_scales=WEIGHTS.down_scales * torch.nan),
    ]
    for mutated in mutations:
        with pytest.raises(SelfCheckFailed, match="self-check of layer 1 on backend torch failed"):
            check(mutated)
