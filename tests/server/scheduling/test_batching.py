"""Batching, bounds and order, with a backend whose progress the test controls."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace

import pytest
import pytest_asyncio
import torch
from prometheus_client import CollectorRegistry

from expertd.kernels.numerics.backend import Computed, LayerWeights, Partials, TokenBatch
from expertd.kernels.torch.backend import Finished, TorchBackend
from expertd.proto.base.errors import DeadlineExceeded, Overloaded, ServerFault, Unavailable
from expertd.server.scheduling.batching import OVERLAP_TOKENS, Scheduler, may_start
from expertd.server.scheduling.device import DeviceOwner
from expertd.server.scheduling.queue import Completed
from expertd.server.telemetry.metrics import Metrics
from tests.support.serving import matrices_of, random_batch, random_weights

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


@pytest_asyncio.fixture
async def gated() -> AsyncIterator[tuple[GatedBackend, Scheduler]]:
    backend = GatedBackend()
    async for scheduler in serve(backend):
        yield backend, scheduler
        backend.gate.set()


async def serve(
    backend: TorchBackend, max_batch_tokens: int = 16, max_queued_tokens: int = 20
) -> AsyncIterator[Scheduler]:
    for layer in (1, 2):
        backend.load_layer(layer, WEIGHTS)
    device = DeviceOwner()
    device.start()
    scheduler = Scheduler(
        backend,
        device,
        EXPERTS,
        max_batch_tokens=max_batch_tokens,
        max_queued_tokens=max_queued_tokens,
        max_queued_bytes=MAX_BYTES,
        metrics=Metrics(CollectorRegistry()),
    )
    scheduler.open()
    yield scheduler
    device.stop()


def batch(tokens: int, seed: int = 0) -> TokenBatch:
    return random_batch(tokens, HIDDEN, EXPERTS, TOP_K, seed=seed)


def submit(
    scheduler: Scheduler, layer: int, tokens: TokenBatch, timeout: float | None = None
) -> asyncio.Task[Completed]:
    return asyncio.create_task(scheduler.execute("caller", layer, tokens, torch.float32, timeout))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_waits_for_a_layer_becomes_one_batch_and_each_gets_its_own_result(
    gated: tuple[GatedBackend, Scheduler],
) -> None:
    backend, scheduler = gated
    first = submit(scheduler, 1, batch(1))
    await settle()
    batches = [batch(tokens, seed=tokens) for tokens in (3, 2, 4)]
    waiting = [submit(scheduler, layer, tokens) for layer, tokens in zip((1, 2, 1), batches, strict=True)]
    await settle()
    assert scheduler.queued_tokens == 9
    backend.gate.set()
    results = await asyncio.gather(first, *waiting)
    assert backend.batches == [(1, 1), (1, 7), (2, 2)]
    assert backend.threads == {"device-owner"}
    assert scheduler.queued_tokens == 0
    for layer, tokens, result in zip((1, 2, 1), batches, results[1:], strict=True):
        alone = TorchBackend.execute(backend, layer, tokens)
        assert torch.equal(result.partials.sums, alone.sums)
        assert result.partials.pairs.tolist() == alone.pairs.tolist()
        assert result.waited > 0


async def test_a_full_queue_refuses_with_its_numbers_and_accepts_again_later(
    gated: tuple[GatedBackend, Scheduler],
) -> None:
    backend, scheduler = gated
    running, queued = submit(scheduler, 1, batch(1)), submit(scheduler, 1, batch(16))
    await settle()
    with pytest.raises(Overloaded, match="16 tokens are queued and num_tokens is 5; at most 20 may wait"):
        await submit(scheduler, 1, batch(5))
    fits = submit(scheduler, 1, batch(4))
    backend.gate.set()
    await asyncio.gather(running, queued, fits)
    await submit(scheduler, 1, batch(16))


async def test_a_full_queue_says_when_to_come_back_once_it_knows_the_devices_pace(
    gated: tuple[GatedBackend, Scheduler],
) -> None:
    backend, scheduler = gated
    backend.gate.set()

    async def refusal() -> Overloaded:
        with pytest.raises(Overloaded) as caught:
            scheduler.check_room(21, 1)
        return caught.value

    assert (await refusal()).retry_after is None
    await submit(scheduler, 1, batch(16))
    known = (await refusal()).retry_after
    assert known is not None
    assert 0.001 <= known <= 5.0
    backend.gate.clear()
    waiting = [submit(scheduler, 1, batch(16)), submit(scheduler, 1, batch(16))]
    await settle()
    fuller = (await refusal()).retry_after
    assert fuller is not None
    assert fuller >= known
    backend.gate.set()
    await asyncio.gather(*waiting)


async def test_bytes_that_wait_are_bounded_too(gated: tuple[GatedBackend, Scheduler]) -> None:
    backend, scheduler = gated
    running, queued = submit(scheduler, 1, batch(1)), submit(scheduler, 1, batch(4))
    await settle()
    waiting = batch(4).num_bytes
    assert waiting == 4 * (HIDDEN + 4 * HIDDEN // 128 + 8 * TOP_K)
    scheduler.check_room(1, MAX_BYTES - waiting)
    with pytest.raises(Overloaded, match=f"{waiting} bytes are queued and the request's tensors have .* at most"):
        scheduler.check_room(1, MAX_BYTES - waiting + 1)
    backend.gate.set()
    await asyncio.gather(running, queued)
    scheduler.check_room(1, MAX_BYTES)


async def test_cancelled_and_expired_requests_never_reach_the_device(gated: tuple[GatedBackend, Scheduler]) -> None:
    backend, scheduler = gated
    running = submit(scheduler, 1, batch(1))
    cancelled = submit(scheduler, 1, batch(2))
    expired = submit(scheduler, 2, batch(3), timeout=0.01)
    kept = submit(scheduler, 2, batch(4), timeout=60)
    await settle()
    cancelled.cancel()
    await asyncio.sleep(0.02)
    backend.gate.set()
    await asyncio.gather(running, kept)
    with pytest.raises(DeadlineExceeded, match=r"ran out after 0\.0\d+ s in the queue"):
        await expired
    assert backend.batches == [(1, 1), (2, 4)]
    assert scheduler.queued_tokens == 0


async def test_what_is_cancelled_in_the_queue_makes_room_at_once(gated: tuple[GatedBackend, Scheduler]) -> None:
    backend, scheduler = gated
    running, cancelled = submit(scheduler, 1, batch(1)), submit(scheduler, 1, batch(20))
    await settle()
    with pytest.raises(Overloaded):
        scheduler.check_room(1, 0)
    cancelled.cancel()
    await settle()
    assert cancelled.cancelled()
    scheduler.check_room(20, MAX_BYTES)
    backend.gate.set()
    await running
    assert backend.batches == [(1, 1)]


async def test_what_is_cancelled_under_way_ends_when_the_device_no_longer_uses_its_tensors(
    gated: tuple[GatedBackend, Scheduler],
) -> None:
    backend, scheduler = gated
    running = submit(scheduler, 1, batch(1))
    await settle()
    running.cancel()
    await asyncio.sleep(0.1)
    assert not running.done()
    backend.gate.set()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert backend.batches == [(1, 1)]


async def test_an_error_that_nobody_waits_for_any_more_is_no_complaint(
    gated: tuple[GatedBackend, Scheduler], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend, scheduler = gated

    def fail(layer: int, batch: TokenBatch) -> Partials:
        backend.gate.wait(10)
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(backend, "execute", fail)
    running = submit(scheduler, 1, batch(1))
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
    large = OVERLAP_TOKENS
    async for scheduler in serve(backend, max_batch_tokens=large, max_queued_tokens=10 * large):
        sizes = (large, large, large, 1, 2)
        tasks = [submit(scheduler, 1, batch(tokens, seed=number)) for number, tokens in enumerate(sizes)]
        await settle()
        assert scheduler.queued_tokens == large + 3, "two are under way"
        for gate in backend.gates:
            await asyncio.sleep(0.01)
            gate.set()
        results = await asyncio.gather(*tasks)
        assert backend.started == [large, large, large, 3]
        for number, (tokens, result) in enumerate(zip(sizes, results, strict=True)):
            assert torch.equal(result.partials.sums, backend.execute(1, batch(tokens, seed=number)).sums)


@pytest.mark.parametrize(
    ("under_way", "waiting", "depth", "expected"),
    [
        ([], 1, 1, True),
        ([1], OVERLAP_TOKENS, 1, False),
        ([1], OVERLAP_TOKENS - 1, 2, False),
        ([1], OVERLAP_TOKENS, 2, True),
        ([OVERLAP_TOKENS], 1, 2, True),
        ([OVERLAP_TOKENS, 1], OVERLAP_TOKENS, 2, False),
    ],
    ids=["idle", "no overlap", "two small ones", "large behind small", "small behind large", "as many as may be"],
)
def test_when_the_next_batch_starts(under_way: list[int], waiting: int, depth: int, expected: bool) -> None:
    assert may_start(under_way, waiting, depth) is expected


async def test_closing_refuses_new_requests_and_answers_accepted_ones(gated: tuple[GatedBackend, Scheduler]) -> None:
    backend, scheduler = gated
    accepted = [submit(scheduler, 1, batch(1)), submit(scheduler, 1, batch(2))]
    await settle()
    scheduler.close("draining", refusing=False)
    with pytest.raises(Unavailable, match="draining"):
        scheduler.check_open()
    scheduler.check_room(1, 1)
    scheduler.close("draining")
    with pytest.raises(Unavailable, match="draining"):
        await submit(scheduler, 1, batch(1))
    backend.gate.set()
    assert [result.partials.sums.shape[0] for result in await asyncio.gather(*accepted)] == [1, 2]


@pytest.mark.parametrize(
    ("backend", "complaint"),
    [
        (BrokenBackend(), "the device failed: RuntimeError: CUDA error: unspecified launch failure"),
        (MiscountingBackend(), r"layer 1: the device computed pairs \[.*\], not \[.*\]"),
    ],
    ids=["device error", "lost pair"],
)
async def test_a_failing_device_is_answered_to_everyone_who_waits(backend: TorchBackend, complaint: str) -> None:
    async for scheduler in serve(backend):
        tasks = [submit(scheduler, 1, random_batch(4, HIDDEN, EXPERTS, TOP_K, absent=0.0)) for _ in range(3)]
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
