"""The executor on a fake driver: results, order, addresses, and every call failing once."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.native.build import ROOT, SANITIZED, build_library
from tests.support.native.fake_gpu import (
    BF16,
    CLASSES,
    EXPERTS,
    FP8,
    FP32,
    HIDDEN,
    MS,
    ON_DEVICE,
    ON_PEER,
    PINNED,
    WIDTH,
    Built,
    Fake,
    Layer,
    Request,
    build_fake,
)

sanitized = bool(os.environ.get("EXPERTD_SANITIZED"))
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")

INWARD, COMPUTE, OUTWARD, EXPRESS = STREAMS = range(4)
OUT_OF_MEMORY, ILLEGAL_ADDRESS = 2, 700
OUT_OF_MEMORY_SAID = r"the device failed: CUDA_ERROR_OUT_OF_MEMORY: out of memory \(\w+\.(cc|h):\d+\)"
"""With the call of ours that was refused."""
LOST = "the device failed: CUDA_ERROR_ILLEGAL_ADDRESS: an illegal memory access was encountered"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_fake(tmp_path_factory.mktemp("native"), *(SANITIZED if sanitized else ("-O1",)))


class Bench:
    """An executor on the fake driver with a graph for every kind of batch."""

    def __init__(
        self,
        built: Built,
        fake: Fake,
        depth: int = 2,
        time_every: int = 1,
        classes: tuple[int, ...] = CLASSES,
        **options: int,
    ) -> None:
        self.extension, self.fake = built.extension, fake
        self.jobs: list[Any] = []
        shape = (HIDDEN, EXPERTS, WIDTH)
        self.rig = built.extension.Rig(str(built.library), 0, depth, shape, classes, time_every, **options)
        self.layers = [Layer(fake, seed) for seed in (1, 2, 3)]
        for tokens in classes:
            for hidden, reply in ((FP8, BF16), (FP8, FP32), (BF16, BF16), (BF16, FP32)):
                self.add(tokens, hidden, reply)
        fake.forget_graphs()
        fake.run()
        fake.called()
        fake.serving(1)

    def add(self, tokens: int, hidden: int, reply: int, odd: int = -1, layer: int = 0, steps: int = 1) -> None:
        captured, given = self.layers[0].addresses, self.layers[layer].addresses
        self.fake.add_graphs(self.rig.executor, captured, tokens, hidden, reply, given=given, odd=odd, steps=steps)

    def job(self, *requests: Request, layer: int = 0) -> Any:  # noqa: ANN401
        first, weights = requests[0], self.layers[layer].addresses
        parts = [request.part for request in requests]
        dtypes = (first.hidden_dtype, first.reply_dtype)
        return self.extension.Job(*dtypes, first.top_k, parts, weights, HIDDEN, requests)

    def start(self, *requests: Request, layer: int = 0, now: int = 0) -> Any:  # noqa: ANN401
        job = self.job(*requests, layer=layer)
        self.jobs.append(job)  # as an engine does, until it has come back
        self.rig.start(job, now)
        return job

    def compute(self, *requests: Request, layer: int = 0) -> Any:  # noqa: ANN401
        job = self.start(*requests, layer=layer)
        assert self.rig.poll(0) is None
        self.fake.run()
        assert self.rig.poll(MS) is job
        return job

    def check(self, job: Any, *requests: Request, layer: int = 0) -> None:  # noqa: ANN401
        assert job.error == ""
        ids = np.concatenate([request.ids[request.ids >= 0] for request in requests])
        assert job.pairs == np.bincount(ids, minlength=EXPERTS).tolist()
        for request in requests:
            request.check(self.layers[layer])

    def poison(self) -> None:
        """Fill all that the bays have on the device with what no result may show."""
        for bay in range(self.rig.executor.depth):
            for name, size in (("ids", 1 << 16), ("pairs", 1 << 16)):
                at = self.rig.executor.places(bay=bay, tokens=CLASSES[-1], hidden_dtype=BF16, reply_dtype=FP32)
                ctypes.memset(self.fake.device_bytes(ctypes.c_uint64(at[name])), 0x7F, size)


@pytest.fixture
def fake(built: Built) -> Iterator[Fake]:
    fake = Fake(built.library)
    yield fake
    assert fake.breaches().decode() == ""


@pytest.fixture
def bench(built: Built, fake: Fake) -> Iterator[Bench]:
    bench = Bench(built, fake)
    yield bench
    close(bench)


@pytest.fixture
def make(built: Built, fake: Fake) -> Iterator[Callable[..., Bench]]:
    """Makes a bench with other options."""
    made: list[Bench] = []

    def make(**options: Any) -> Bench:  # noqa: ANN401
        made.append(Bench(built, fake, **options))
        return made[-1]

    yield make
    for bench in made:
        close(bench)


def close(bench: Bench) -> None:
    """End without batches under way, and find nothing left."""
    bench.fake.serving(0)
    bench.rig.close()
    for layer in bench.layers:
        for address in layer.addresses:
            bench.fake.device_floats_free(ctypes.c_uint64(address))
    assert bench.fake.alive() == 0


@pytest.fixture
def pinned(fake: Fake) -> Iterator[list[Request]]:
    """Requests that pin their memory, in steps as a segment is."""
    requests: list[Request] = []
    yield requests
    for request in requests:
        for memory in (request.hidden, request.sums):
            for address, _ in steps(memory):
                fake.unregister(ctypes.c_void_p(address))


def steps(memory: np.ndarray) -> list[tuple[int, int]]:
    begin, end, step = memory.ctypes.data, memory.ctypes.data + memory.nbytes, 2 << 20
    cuts = [begin, *range(begin // step * step + step, end, step), end]
    return [(first, last - first) for first, last in pairwise(cuts)]


def pin(fake: Fake, pinned: list[Request], request: Request) -> Request:
    request.reach = PINNED
    pinned.append(request)
    for memory in (request.hidden, request.sums):
        for address, size in steps(memory):
            fake.register(ctypes.c_void_p(address), ctypes.c_size_t(size))
    return request


class Shared:
    """Memory on the device that callers have, exactly as much as their requests need."""

    def __init__(self, fake: Fake) -> None:
        self._fake = fake
        self._taken: list[tuple[Request, np.ndarray, int]] = []
        self._places: list[int] = []

    def put(self, request: Request, skip: int = 0, reach: int = ON_DEVICE) -> Request:
        """Move a request's rows to the device, `skip` bytes from where an allocation begins."""
        sums = request.sums[:-1]
        scales = request.scales[:0] if request.hidden_dtype == BF16 else request.scales
        places = [self._copy(memory, skip) for memory in (request.hidden, scales, sums)]
        request.rows = (places[0], places[1] if scales.size else 0, places[2])
        request.reach = reach
        self._taken.append((request, sums, places[2]))
        return request

    def fetch(self) -> None:
        for _, sums, place in self._taken:
            ctypes.memmove(sums.ctypes.data, self._fake.device_bytes(ctypes.c_uint64(place)), sums.nbytes)

    def free(self) -> None:
        for place in self._places:
            self._fake.unshare(ctypes.c_uint64(place))

    def _copy(self, memory: np.ndarray, skip: int) -> int:
        place = int(self._fake.share(ctypes.c_size_t(memory.nbytes + skip)))
        self._places.append(place)
        ctypes.memmove(self._fake.device_bytes(ctypes.c_uint64(place + skip)), memory.ctypes.data, memory.nbytes)
        return place + skip


@pytest.fixture
def shared(fake: Fake) -> Iterator[Shared]:
    shared = Shared(fake)
    yield shared
    shared.free()


@pytest.mark.parametrize("hidden_dtype", [FP8, BF16])
@pytest.mark.parametrize("reply_dtype", [BF16, FP32])
@pytest.mark.parametrize("tokens", CLASSES)
def test_the_parts_of_a_batch_lie_apart_as_kernels_want_them(
    bench: Bench, tokens: int, hidden_dtype: int, reply_dtype: int
) -> None:
    at = bench.rig.executor.places(bay=1, tokens=tokens, hidden_dtype=hidden_dtype, reply_dtype=reply_dtype)
    hidden, scales = (HIDDEN, HIDDEN // 128 * 4) if hidden_dtype == FP8 else (2 * HIDDEN, 0)
    rows = {"ids": 4 * WIDTH, "weights": 4 * WIDTH, "scales": scales, "hidden": hidden}
    ends = sorted((at[name], at[name] + tokens * row) for name, row in rows.items() if row)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ends))
    assert ends[-1][0] == at["hidden"], "a copy that ends after the last row in use moves no more than it must"
    assert at["pairs"] + 4 * EXPERTS <= at["sums"]
    assert all(place % 256 == 0 for place in at.values())


@pytest.mark.parametrize("tokens", [1, 5, 8, 255, 256, 300, 512])
@pytest.mark.parametrize("hidden_dtype", [FP8, BF16])
@pytest.mark.parametrize("reply_dtype", [BF16, FP32])
def test_a_lone_request(bench: Bench, tokens: int, hidden_dtype: int, reply_dtype: int) -> None:
    bench.poison()
    for seed in range(3):
        request = Request(tokens, hidden_dtype, reply_dtype, seed=seed)
        bench.check(bench.compute(request), request)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 200, 7), (100, 156), (1, 300, 2, 209)])
def test_merged_requests(bench: Bench, sizes: tuple[int, ...]) -> None:
    bench.poison()
    requests = [Request(tokens, seed=index) for index, tokens in enumerate(sizes)]
    bench.check(bench.compute(*requests), *requests)


@pytest.mark.parametrize("sizes", [(60, 1, 3), (100, 156)])
@pytest.mark.parametrize("all_there", [False, True], ids=["the first", "all"])
def test_requests_on_the_device_that_fill_their_class_together(
    bench: Bench, shared: Shared, sizes: tuple[int, ...], all_there: bool
) -> None:
    bench.poison()
    requests = [Request(tokens, seed=index) for index, tokens in enumerate(sizes)]
    for request in requests if all_there else requests[:1]:
        shared.put(request)
    job = bench.compute(*requests)
    shared.fetch()
    bench.check(job, *requests)


@pytest.mark.parametrize("top_k", [1, 2])
def test_fewer_experts_a_token_than_the_model_has(bench: Bench, top_k: int) -> None:
    requests = [Request(tokens, top_k=top_k) for tokens in (3, 9)]
    bench.compute(Request(12, seed=9))  # leaves ids behind
    bench.check(bench.compute(*requests), *requests)


def test_rows_of_padding_have_no_experts(bench: Bench) -> None:
    full = Request(64, seed=1)
    bench.compute(full)
    few = Request(9, seed=2)
    job = bench.compute(few)
    bench.check(job, few)
    assert sum(job.pairs) == (few.ids >= 0).sum()


def small_batch(bench: Bench, stream: int) -> tuple[list[str], list[str]]:
    """What is asked for of a stream, and of the driver, for a batch whose graph knows its addresses."""
    for _ in range(2):
        bench.fake.called()
        bench.start(Request(5), layer=1)
        queue, calls = bench.fake.queue(stream), bench.fake.called()
        bench.fake.run()
        assert bench.rig.poll(0) is not None
    return queue, [call for call in calls if not call.startswith("cuEventRecord")]


def test_a_small_batch_is_a_graph_that_works_on_the_hosts_memory_and_a_word(bench: Bench) -> None:
    queue, calls = small_batch(bench, EXPRESS)
    assert queue == ["event", "event", "graph", "event", "event", "word"]
    assert calls == ["cuCtxSetCurrent", f"cuGraphLaunch {EXPRESS}", f"cuStreamWriteValue32 {EXPRESS}"]


def test_without_an_express_stream_it_is_copied_in_and_out(make: Callable[..., Bench]) -> None:
    queue, calls = small_batch(make(express_rows=0), COMPUTE)
    assert queue == ["event", "in", "event", "graph", "event", "out", "event", "word"]
    assert calls == [
        "cuCtxSetCurrent",
        f"cuMemcpyHtoDAsync {COMPUTE}",
        f"cuGraphLaunch {COMPUTE}",
        f"cuMemcpyDtoHAsync {COMPUTE}",
        f"cuStreamWriteValue32 {COMPUTE}",
    ]


def test_where_addresses_are_told_of_kernels_those_of_the_device_are_told(bench: Bench) -> None:
    kind = {"bay": 0, "tokens": 8, "hidden_dtype": FP8, "reply_dtype": BF16}
    before = bench.rig.executor.places(**kind)
    bench.compute(Request(5))
    assert bench.rig.executor.places(**kind) == before


def aligned(request: Request, skip: int = 0) -> Request:
    """Moves its rows to memory of its own, `skip` bytes behind a multiple of 64."""
    for name in ("hidden", "sums"):
        rows = getattr(request, name)
        room = np.empty(rows.nbytes + 128, dtype=np.uint8)
        at = -room.ctypes.data % 64 + skip
        moved = room[at : at + rows.nbytes].view(rows.dtype).reshape(rows.shape)
        moved[:] = rows
        setattr(request, name, moved)
    request.rows = (request.hidden.ctypes.data, request.rows[1], request.sums.ctypes.data)
    return request


LONE = {"classes": (1, 128, 512)}
"""A class whose rows are more than 64 KiB and that is small."""


@pytest.mark.parametrize("skip", [0, 64])
def test_a_lone_request_that_fills_its_small_class_is_computed_where_it_lies(
    make: Callable[..., Bench], fake: Fake, pinned: list[Request], skip: int
) -> None:
    bench = make(**LONE)
    for layer in (0, 1):
        request = pin(fake, pinned, aligned(Request(128, BF16, FP32, seed=layer), skip))
        bench.rig.hold_copies(True)
        job = bench.start(request, layer=layer)
        assert fake.queue(EXPRESS) == ["event", "event", "graph", "event", "event", "word"]
        fake.run()
        assert bench.rig.poll(MS) is job
        assert bench.rig.held_copies() == 0
        bench.check(job, request, layer=layer)


@pytest.mark.parametrize(("tokens", "skip", "reaches"), [(100, 0, True), (128, 16, True), (128, 0, False)])
def test_the_device_copies_a_lone_request_that_kernels_cannot_work_on(
    make: Callable[..., Bench], fake: Fake, pinned: list[Request], tokens: int, skip: int, reaches: bool
) -> None:
    fake.reaches_registered(int(reaches))
    bench = make(**LONE)
    request = pin(fake, pinned, aligned(Request(tokens, BF16, FP32), skip))
    bench.rig.hold_copies(True)
    job = bench.start(request)
    assert {"in", "out"} <= set(fake.queue(EXPRESS))
    fake.run()
    assert bench.rig.poll(MS) is job
    bench.check(job, request)


def test_rows_of_padding_that_are_many_bytes_do_not_take_the_bus(make: Callable[..., Bench], fake: Fake) -> None:
    bench = make(classes=(1, 1024), express_rows=1024)
    request = Request(5, FP8, FP32)
    job = bench.start(request)
    assert "in" not in fake.queue(EXPRESS)
    assert fake.queue(EXPRESS).count("out") == 1
    fake.run()
    assert bench.rig.poll(MS) is job
    bench.check(job, request)


def test_the_end_of_a_small_batch_is_seen_without_the_driver(bench: Bench) -> None:
    job = bench.start(Request(5))
    bench.fake.called()
    for now in range(1000):
        assert bench.rig.poll(now) is None
    assert bench.fake.called() == []
    bench.fake.run()
    assert bench.rig.poll(1000) is job


def test_a_lone_large_request_is_copied_from_and_to_its_own_memory(
    bench: Bench, fake: Fake, pinned: list[Request]
) -> None:
    request = pin(fake, pinned, Request(300, hidden_dtype=BF16, reply_dtype=FP32))
    bench.rig.hold_copies(True)
    job = bench.start(request)
    assert fake.queue(0)[0] == "event"
    fake.run()
    assert bench.rig.poll(0) is job
    bench.check(job, request)
    assert bench.rig.held_copies() == 0


def test_copies_are_cut_where_a_segment_was_pinned_in_steps(bench: Bench, fake: Fake, pinned: list[Request]) -> None:
    # 512 rows of 2 KiB are 1 MiB: at some of these places they cross a step.
    crossed = 0
    for seed in range(4):
        request = Request(512, reply_dtype=FP32, seed=seed)
        room = np.empty((4 << 20) + request.sums.nbytes, dtype=np.uint8)
        skip = -room.ctypes.data % (2 << 20) + (1 << 20) + (seed << 18)
        request.sums = room[skip : skip + request.sums.nbytes].view(np.uint32).reshape(request.sums.shape)
        request.rows = (*request.rows[:2], request.sums.ctypes.data)
        request.sums[:] = 0xABAB
        pin(fake, pinned, request)
        crossed += len(steps(request.sums)) > 1
        bench.check(bench.compute(request), request)
    assert crossed > 1


def test_parts_in_pinned_memory_beside_others(bench: Bench, fake: Fake, pinned: list[Request]) -> None:
    requests = [Request(tokens, reply_dtype=FP32, seed=index) for index, tokens in enumerate((3, 140, 130, 4, 200))]
    for index in (1, 2, 4):
        pin(fake, pinned, requests[index])
    bench.check(bench.compute(*requests), *requests)


def test_small_pinned_requests_are_gathered(bench: Bench, fake: Fake, pinned: list[Request]) -> None:
    requests = [pin(fake, pinned, Request(tokens, seed=tokens)) for tokens in (3, 60, 1)]
    job = bench.start(*requests)
    assert not {"in", "out"} & set(fake.queue(EXPRESS))
    fake.run()
    assert bench.rig.poll(0) is job
    bench.check(job, *requests)


def set_nodes(calls: list[str]) -> int:
    return calls.count("cuGraphExecKernelNodeSetParams")


def test_addresses_are_set_when_the_layer_changes_and_only_then(bench: Bench) -> None:
    seen = []
    for layer in (0, 0, 1, 1, 2, 0):
        request = Request(5, seed=layer)
        bench.check(bench.compute(request, layer=layer), request, layer=layer)
        seen.append(set_nodes(bench.fake.called()))
    assert seen == [2, 0, 1, 0, 1, 1], "first of where the host has its memory"


def test_a_setting_that_failed_is_made_again(bench: Bench) -> None:
    bench.fake.fail(b"cuGraphExecKernelNodeSetParams", 1, OUT_OF_MEMORY)
    failed = bench.start(Request(5), layer=1)
    bench.fake.run()
    assert bench.rig.poll(10 * MS) is failed
    assert re.fullmatch(OUT_OF_MEMORY_SAID, failed.error)
    request = Request(5)
    bench.check(bench.compute(request, layer=1), request, layer=1)


def test_a_large_batch_is_copied_in_while_another_computes(bench: Bench) -> None:
    first, second = Request(300, seed=1), Request(400, seed=2)
    jobs = [bench.start(first), bench.start(second)]
    fake = bench.fake
    while fake.step(0):
        pass
    assert fake.queue(0) == []
    assert fake.queue(1).count("graph") == 2
    while fake.step(1):
        pass
    assert bench.rig.poll(0) is None
    assert fake.queue(2).count("out") == 2
    fake.run()
    assert [bench.rig.poll(0), bench.rig.poll(0)] == jobs
    bench.check(jobs[0], first)
    bench.check(jobs[1], second)


def test_a_stage_waits_for_the_one_before(bench: Bench) -> None:
    job = bench.start(Request(300))
    fake = bench.fake
    assert not fake.step(1)
    assert not fake.step(2)
    fake.step(0)
    assert not fake.step(1)
    fake.run()
    assert bench.rig.poll(0) is job


@pytest.mark.parametrize("large_goes_on", [True, False])
def test_a_small_batch_does_not_wait_for_a_large_one(bench: Bench, large_goes_on: bool) -> None:
    large, small = Request(300), Request(5)
    jobs = [bench.start(large), bench.start(small)]
    for stream in (INWARD, COMPUTE, EXPRESS) if large_goes_on else (EXPRESS,):
        while bench.fake.step(stream):
            pass
    assert bench.rig.poll(0) is jobs[1]
    bench.check(jobs[1], small)
    assert bench.rig.poll(0) is None
    bench.fake.run()
    assert bench.rig.poll(0) is jobs[0]
    bench.check(jobs[0], large)


def test_a_bay_is_used_again_and_again(bench: Bench) -> None:
    random = np.random.default_rng(5)
    waiting: list[tuple[Any, list[Request], int]] = []
    for turn in range(150):
        sizes = random.integers(1, 120, size=random.integers(1, 5))
        layer = int(random.integers(3))
        requests = [Request(int(tokens), seed=turn) for tokens in sizes]
        waiting.append((bench.start(*requests, layer=layer), requests, layer))
        if len(waiting) == 2:
            for stream in random.integers(len(STREAMS), size=20):
                bench.fake.step(int(stream))
            bench.fake.run()
            for job, its, of in waiting:
                assert bench.rig.poll(turn) is not None
                bench.check(job, *its, layer=of)
            waiting.clear()


def test_large_copies_are_the_copiers(bench: Bench) -> None:
    requests = [Request(tokens, BF16, FP32, seed=tokens) for tokens in (200, 250)]
    bench.rig.hold_copies(True)
    job = bench.start(*requests)
    assert bench.rig.poll(0) is None
    assert bench.fake.queue(0) == []
    assert bench.rig.held_copies() == 1
    bench.rig.go_copies()
    assert bench.rig.poll(5 * MS) is None
    bench.fake.run()
    assert bench.rig.poll(7 * MS) is None
    assert bench.rig.held_copies() == 1
    bench.rig.go_copies()
    assert bench.rig.poll(10 * MS) is job
    bench.check(job, *requests)
    copy_in, compute, copy_out = job.timings
    assert copy_in >= 5e-3
    assert compute > 0
    assert copy_out >= 3e-3


def test_timings_are_those_of_the_stages(bench: Bench) -> None:
    for tokens in (5, 300):
        job = bench.compute(Request(tokens))
        assert job.measured
        copy_in, compute, copy_out = job.timings
        assert copy_in > 0
        assert compute > 0
        assert copy_out > 0


def test_of_some_small_batches_one_is_timed(built: Built, fake: Fake) -> None:
    bench = Bench(built, fake, depth=1, time_every=4)
    jobs = [bench.compute(Request(5)) for _ in range(9)]
    assert [job.measured for job in jobs] == [True, False, False, False, True, False, False, False, True]
    assert all(job.timings == jobs[0].timings for job in jobs)
    assert bench.compute(Request(300)).measured
    assert bench.compute(Request(300)).measured
    close(bench)


def test_made_used_and_ended_by_different_threads(built: Built, fake: Fake) -> None:
    with ThreadPoolExecutor(1) as maker, ThreadPoolExecutor(1) as user, ThreadPoolExecutor(1) as ender:
        bench = maker.submit(Bench, built, fake).result()
        for tokens in (5, 300):
            request = Request(tokens)
            bench.check(user.submit(bench.compute, request).result(), request)
        ender.submit(close, bench).result()


def test_when_a_batch_is_due(bench: Bench) -> None:
    assert bench.rig.due() == 0
    bench.start(Request(5), now=1000)
    bench.fake.run()
    assert bench.rig.poll(6000) is not None
    bench.start(Request(5), now=10_000)
    assert bench.rig.due() == 15_000
    bench.fake.run()
    assert bench.rig.poll(16_000) is not None


def test_refusals(bench: Bench) -> None:
    assert bench.start(Request(513)).error == "513 tokens: a batch has 1 to 512"
    assert bench.start(Request(5, reply_dtype=9)).error == "no graph was captured for 8 tokens of these dtypes"
    wide = bench.job(Request(5))
    assert len([bench.rig.poll(0) for _ in range(2)]) == 2
    assert bench.rig.poll(0) is None
    assert wide.error == ""


def test_what_has_no_bay_waits_for_one(bench: Bench) -> None:
    requests = [Request(5), Request(300, seed=1), Request(7, seed=2), Request(400, seed=3)]
    jobs = [bench.start(request) for request in requests]
    assert [bench.rig.poll(0) for _ in range(2)] == [None, None]
    back: list[Any] = []
    while len(back) < len(jobs):
        bench.fake.run()
        back += [job for job in [bench.rig.poll(MS)] if job is not None]
    for job, request in zip(jobs, requests, strict=True):
        bench.check(job, request)


def drained(bench: Bench, now: int) -> list[Any]:
    jobs = []
    while (job := bench.rig.poll(now)) is not None:
        jobs.append(job)
    return jobs


LAUNCH = {
    5: {
        "cuCtxSetCurrent": 1,
        "cuEventRecord": 4,
        "cuGraphExecKernelNodeSetParams": 2,
        "cuGraphLaunch": 1,
        "cuStreamWriteValue32": 1,
    },
    300: {
        "cuCtxSetCurrent": 1,
        "cuEventRecord": 6,
        "cuMemcpyHtoDAsync": 1,
        "cuGraphExecKernelNodeSetParams": 1,
        "cuStreamWaitEvent": 2,
        "cuGraphLaunch": 1,
        "cuMemcpyDtoHAsync": 1,
        "cuStreamWriteValue32": 1,
    },
}
EVERY_CALL = [
    (t, name, nth) for t, calls in LAUNCH.items() for name, count in calls.items() for nth in range(1, count + 1)
]


@pytest.mark.parametrize(("tokens", "name", "nth"), EVERY_CALL)
def test_a_call_that_fails_fails_its_batch_alone(bench: Bench, tokens: int, name: str, nth: int) -> None:
    other_request = Request(7)
    other = bench.start(other_request)
    bench.fake.fail(name.encode(), nth, OUT_OF_MEMORY)
    failed = bench.start(Request(tokens), layer=1)
    # Not before the device has let go of its memory.
    assert drained(bench, 0) == []
    bench.fake.run()
    assert {id(job) for job in drained(bench, 20 * MS)} == {id(failed), id(other)}
    assert re.fullmatch(OUT_OF_MEMORY_SAID, failed.error)
    assert not failed.device_lost
    bench.check(other, other_request)
    after = Request(tokens, seed=4)
    bench.check(bench.compute(after, layer=1), after, layer=1)


def test_a_failed_batch_comes_back_though_others_keep_the_device_busy(bench: Bench) -> None:
    bench.fake.fail(b"cuGraphLaunch", 1, OUT_OF_MEMORY)
    failed = bench.start(Request(300))
    bench.start(Request(300, seed=1))
    for stream in (INWARD, INWARD, INWARD, INWARD, COMPUTE, COMPUTE, COMPUTE, OUTWARD):
        bench.fake.step(stream)
    assert failed in drained(bench, 20 * MS)
    assert bench.fake.queue(COMPUTE) != []
    bench.fake.run()
    assert len(drained(bench, 20 * MS)) == 1


def test_marks_that_fail_too(bench: Bench) -> None:
    bench.fake.fail(b"cuGraphLaunch", 1, OUT_OF_MEMORY)
    for nth in (3, 4, 5):
        bench.fake.fail(b"cuEventRecord", nth, OUT_OF_MEMORY)
    failed = bench.start(Request(5))
    assert drained(bench, 0) == []
    bench.fake.run()
    assert drained(bench, 20 * MS) == [failed]


def test_timings_that_cannot_be_read_are_left_out(bench: Bench) -> None:
    bench.fake.fail(b"cuEventElapsedTime", 2, OUT_OF_MEMORY)
    request = Request(5)
    job = bench.compute(request)
    bench.check(job, request)
    assert not job.measured


def test_a_late_batch_is_asked_about_every_10_ms(bench: Bench) -> None:
    bench.compute(Request(5))  # took 1 ms
    bench.fake.called()
    job = bench.start(Request(5), now=100 * MS)
    bench.fake.called()
    for now in range(100, 150):
        assert bench.rig.poll(now * MS) is None
    assert bench.fake.called() == ["cuCtxSetCurrent", "cuStreamQuery"] * 5
    bench.fake.run()
    assert bench.rig.poll(150 * MS) is job


@pytest.mark.parametrize("tokens", [5, 300])
def test_a_lost_device_fails_all_under_way_and_what_comes_after(bench: Bench, tokens: int) -> None:
    jobs = [bench.start(Request(tokens)), bench.start(Request(7))]
    bench.fake.sticky(ILLEGAL_ADDRESS)
    assert drained(bench, 5 * MS) == []
    assert len(drained(bench, 11 * MS)) == 2
    jobs.append(bench.start(Request(7)))
    assert drained(bench, 11 * MS) == [jobs[2]]
    assert all(job.device_lost and job.error == LOST for job in jobs)
    assert not bench.rig.resume()
    bench.fake.sticky(0)
    assert not bench.rig.resume()  # what was asked for may yet be done
    bench.fake.run()
    assert bench.rig.resume()
    request = Request(tokens, seed=3)
    bench.check(bench.compute(request), request)


def test_a_failed_launch_on_a_lost_device(bench: Bench) -> None:
    first = bench.start(Request(5))
    bench.fake.sticky(ILLEGAL_ADDRESS)
    second = bench.start(Request(300))
    assert set(map(id, drained(bench, 0))) == {id(first), id(second)}
    assert first.error == second.error == LOST
    bench.fake.sticky(0)
    bench.fake.run()
    assert bench.rig.resume()


def test_a_batch_that_is_staged_when_the_device_is_lost(bench: Bench) -> None:
    bench.rig.hold_copies(True)
    staged = bench.start(Request(500, hidden_dtype=BF16))
    assert bench.rig.held_copies() == 1
    lost = bench.start(Request(5))
    bench.fake.sticky(ILLEGAL_ADDRESS)
    assert drained(bench, 11 * MS) == [lost]
    assert not bench.rig.resume()
    bench.fake.sticky(0)
    bench.fake.run()
    bench.fake.called()
    bench.rig.go_copies()
    assert drained(bench, 12 * MS) == [staged]
    assert staged.error == LOST
    # Nothing starts until somebody says so.
    assert bench.fake.called() == []
    assert bench.rig.resume()


def test_a_batch_that_ended_without_its_word(bench: Bench) -> None:
    job = bench.start(Request(5))
    bench.fake.drop()
    assert drained(bench, 11 * MS) == [job]
    assert job.error == "the device failed: a batch ended without its end word"


def test_what_the_device_may_yet_use_is_leaked(built: Built, fake: Fake) -> None:
    bench = Bench(built, fake)
    bench.start(Request(300))
    fake.serving(0)
    bench.rig.close()
    # Three pieces of pinned memory and two of the device's.
    assert fake.alive() == 5
    assert not [call for call in fake.called() if "Synchronize" in call]


IN_PARTS = {"overlap_tokens": 64, "piece_bytes": 16 << 10}


def parts_of(bench: Bench, tokens: int, *, on_host: bool = True) -> tuple[int, int, int]:
    return tuple(bench.rig.executor.cut(tokens=tokens, on_host=on_host))


def test_how_batches_are_cut(make: Callable[..., Bench], fake: Fake) -> None:
    bench = make(overlap_tokens=256, max_tokens=1200)
    for tokens in range(1, 1201):
        for on_host, limit in ((True, 256), (False, 512)):
            parts, size, rows = parts_of(bench, tokens, on_host=on_host)
            assert size <= rows <= limit
            assert rows == min(one for one in CLASSES if one >= size)
            assert (parts - 1) * size < tokens <= parts * size
            assert parts == 1 or (size % 64 == 0 and size > limit // 2)
    assert parts_of(bench, 257) == (2, 192, 256)
    assert parts_of(bench, 257, on_host=False) == (1, 257, 512)
    bench.check(bench.compute(one := Request(1200)), one)
    assert bench.start(Request(1201)).error == "1201 tokens: a batch has 1 to 1200"


def test_parts_of_the_largest_batch_may_be_smaller_than_a_whole_one(make: Callable[..., Bench]) -> None:
    bench = make(classes=(1, 64, 256, 300), max_tokens=700)
    assert parts_of(bench, 700) == (3, 256, 256)
    assert parts_of(bench, 300) == (1, 300, 300)
    for tokens in (300, 700):
        bench.check(bench.compute(one := Request(tokens)), one)


@pytest.mark.parametrize("hidden_dtype", [FP8, BF16])
@pytest.mark.parametrize("reply_dtype", [BF16, FP32])
@pytest.mark.parametrize("sizes", [(65,), (300,), (512,), (3, 60, 200, 1, 100)])
def test_large_batches_in_parts_and_pieces(
    make: Callable[..., Bench],
    fake: Fake,
    shared: Shared,
    pinned: list[Request],
    sizes: tuple[int, ...],
    hidden_dtype: int,
    reply_dtype: int,
) -> None:
    bench = make(**IN_PARTS)
    bench.poison()
    for turn in range(6):
        requests = [Request(tokens, hidden_dtype, reply_dtype, seed=index) for index, tokens in enumerate(sizes)]
        for index, request in enumerate(requests):
            if (index + turn) % 3 == 1:
                pin(fake, pinned, request)
            elif (index + turn) % 3 == 2:
                shared.put(request)
        job = bench.compute(*requests)
        shared.fetch()
        bench.check(job, *requests)


def test_parts_follow_each_other_without_waiting_for_the_whole(make: Callable[..., Bench], fake: Fake) -> None:
    bench = make(overlap_tokens=256)
    request = Request(512)
    job = bench.start(request)
    assert fake.queue(0).count("in") == 2
    while fake.queue(0).count("in") == 2:
        fake.step(0)
    fake.step(0)  # the first part has arrived, the second has not
    while fake.queue(EXPRESS).count("graph") == 2:
        assert fake.step(EXPRESS)
    while fake.queue(OUTWARD).count("out") == 2:
        assert fake.step(EXPRESS) or fake.step(OUTWARD)
    assert fake.queue(0).count("in") == 1
    assert bench.rig.poll(0) is None
    fake.run()
    assert bench.rig.poll(MS) is job
    bench.check(job, request)
    assert min(job.timings) > 0
    assert job.timings[0] == pytest.approx(2e-3), "of the first part alone: its copy and the mark behind it"


def test_pieces_move_as_soon_as_they_are_staged_and_arrive(make: Callable[..., Bench], fake: Fake) -> None:
    bench = make(piece_bytes=64 << 10)
    request = Request(512, reply_dtype=FP32)
    woken: list[None] = []
    bench.rig.on_done(lambda: woken.append(None))
    bench.rig.hold_copies(True)
    job = bench.start(request)
    pieces = bench.rig.held_copies()
    assert pieces >= 4
    for moved in range(1, pieces):
        bench.rig.go_copy()
        assert bench.rig.poll(0) is None
        assert fake.queue(0).count("in") == moved
        assert bench.rig.due() == 0, "the copier wakes"
    bench.rig.go_copies()
    assert woken
    assert bench.rig.poll(0) is None
    fake.called()
    assert fake.queue(1).count("graph") == 1
    fetched, early = 0, 0
    back = None
    while fake.queue(2):
        fake.step(0) or fake.step(1) or fake.step(2)
        back = bench.rig.poll(MS)
        early = fetched
        while bench.rig.held_copies():
            bench.rig.go_copy()  # what is told of has arrived
            fetched += 1
    assert back is None
    assert (fetched, early) >= (4, 3)
    assert set(fake.called()) == {"cuCtxSetCurrent", "cuEventElapsedTime"}, "seen without the driver"
    assert bench.rig.poll(2 * MS) is job
    bench.check(job, request)
    bench.rig.on_done(None)


def test_what_the_device_reaches_is_not_kept_waiting_by_what_is_staged(
    make: Callable[..., Bench], fake: Fake, pinned: list[Request]
) -> None:
    bench = make(piece_bytes=16 << 10)
    requests = [Request(256, BF16), pin(fake, pinned, Request(256, BF16, seed=1))]
    bench.rig.hold_copies(True)
    job = bench.start(*requests)
    assert "in" in fake.queue(0)
    assert fake.queue(1) == []
    bench.rig.hold_copies(False)
    bench.rig.go_copies()
    assert bench.rig.poll(0) is None
    fake.run()
    assert bench.rig.poll(MS) is job
    bench.check(job, *requests)


@pytest.mark.parametrize("tokens", [1, 5, 8, 64, 200, 256, 300, 512])
@pytest.mark.parametrize("hidden_dtype", [FP8, BF16])
@pytest.mark.parametrize("reply_dtype", [BF16, FP32])
@pytest.mark.parametrize("skip", [0, 64])
def test_a_request_on_the_device(
    bench: Bench, shared: Shared, tokens: int, hidden_dtype: int, reply_dtype: int, skip: int
) -> None:
    bench.poison()
    request = shared.put(Request(tokens, hidden_dtype, reply_dtype), skip)
    job = bench.start(request, layer=1)
    moves = [move for stream in STREAMS for move in bench.fake.queue(stream) if move in ("in", "out", "across")]
    # Where it fills its class, and lies as kernels want it, it is computed where it is: the routing comes, pairs go.
    there = tokens in CLASSES and not skip
    assert moves.count("across") == (0 if there else 2 + (hidden_dtype == FP8))
    small = there and tokens < 256
    assert (moves.count("in"), moves.count("out")) == ((0, 0) if small else (1, 1))
    bench.fake.run()
    assert bench.rig.poll(MS) is job
    shared.fetch()
    bench.check(job, request, layer=1)


def test_requests_on_the_device_and_elsewhere_in_one_batch(
    bench: Bench, fake: Fake, shared: Shared, pinned: list[Request]
) -> None:
    for dtype in (FP8, BF16):
        sizes = (1, 130, 7, 256, 2)
        for turn in range(3):
            requests = [Request(tokens, dtype, seed=index) for index, tokens in enumerate(sizes)]
            for request in requests[turn::3]:
                shared.put(request)
            pin(fake, pinned, requests[(turn + 1) % 3])
            bench.poison()
            job = bench.compute(*requests)
            shared.fetch()
            bench.check(job, *requests)


@pytest.fixture
def stepped(make: Callable[..., Bench], fake: Fake) -> Bench:
    """A bench that computes the largest classes in four steps, too."""
    bench = make(max_tokens=1024)
    fake.serving(0)
    for tokens in (256, 512):
        for hidden, reply in ((FP8, BF16), (FP8, FP32), (BF16, BF16), (BF16, FP32)):
            bench.add(tokens, hidden, reply, steps=4)
    fake.forget_graphs()
    fake.run()
    fake.called()
    fake.serving(1)
    return bench


@pytest.mark.parametrize("tokens", [64, 256, 300, 512, 1024])
@pytest.mark.parametrize("hidden_dtype", [FP8, BF16])
@pytest.mark.parametrize("reply_dtype", [BF16, FP32])
@pytest.mark.parametrize("skip", [0, 64])
def test_a_request_on_another_device(
    stepped: Bench, shared: Shared, tokens: int, hidden_dtype: int, reply_dtype: int, skip: int
) -> None:
    stepped.poison()
    for turn in range(3):  # in both bays, which learn of other addresses
        request = shared.put(Request(tokens, hidden_dtype, reply_dtype, seed=turn), skip, ON_PEER)
        job = stepped.start(request, layer=turn)
        moves = [move for stream in STREAMS for move in stepped.fake.queue(stream)]
        # All sums but those of a part's last step are copied from the bay; nothing else is where the kernels reach it.
        fits, parts = tokens != 300 and not skip, max(1, tokens // CLASSES[-1])
        assert moves.count("graph") == parts * (4 if fits and tokens >= 256 else 1)
        assert moves.count("columns") == (3 * parts if fits and tokens >= 256 else 0)
        assert moves.count("across") == (0 if fits else (2 + (hidden_dtype == FP8)) * parts)
        stepped.fake.run()
        assert stepped.rig.poll(MS) is job
        shared.fetch()
        stepped.check(job, request, layer=turn)


def test_steps_are_for_other_devices_alone(stepped: Bench, shared: Shared) -> None:
    for requests in (
        [shared.put(Request(512))],
        [Request(512)],
        [shared.put(Request(256), reach=ON_PEER), shared.put(Request(256, seed=1), reach=ON_PEER)],
    ):
        job = stepped.start(*requests)
        assert not [move for stream in STREAMS for move in stepped.fake.queue(stream) if move == "columns"]
        stepped.fake.run()
        assert stepped.rig.poll(MS) is job
        shared.fetch()
        stepped.check(job, *requests)


def test_columns_go_while_the_next_are_computed(stepped: Bench, fake: Fake, shared: Shared) -> None:
    request = shared.put(Request(512), reach=ON_PEER)
    job = stepped.start(request)
    while fake.queue(COMPUTE).count("graph") == 4:
        assert fake.step(INWARD) or fake.step(COMPUTE)
    assert fake.queue(OUTWARD)[:2] == ["wait", "columns"]
    assert not fake.step(OUTWARD), "not before they are computed"
    assert fake.step(COMPUTE)
    while fake.queue(OUTWARD).count("columns") == 3:
        assert fake.step(OUTWARD)
    assert fake.queue(COMPUTE).count("graph") == 3
    assert not fake.step(OUTWARD), "the next ones are not computed"
    assert stepped.rig.poll(0) is None
    fake.run()
    assert stepped.rig.poll(MS) is job
    assert min(job.timings) > 0
    shared.fetch()
    stepped.check(job, request)


@pytest.mark.parametrize("nth", range(1, 5))
@pytest.mark.parametrize("name", ["cuMemcpy2DAsync", "cuEventRecord", "cuStreamWaitEvent", "cuGraphLaunch"])
def test_a_call_for_a_step_that_fails(stepped: Bench, fake: Fake, shared: Shared, name: str, nth: int) -> None:
    fake.fail(name.encode(), nth, OUT_OF_MEMORY)
    failed = stepped.start(shared.put(Request(512), reach=ON_PEER))
    struck = len([call for call in fake.called() if call.split()[0] == name]) >= nth
    assert struck == ((name, nth) != ("cuMemcpy2DAsync", 4))
    fake.run()
    assert drained(stepped, 20 * MS) == [failed]
    assert re.fullmatch(OUT_OF_MEMORY_SAID if struck else "", failed.error)
    fake.forget_failures()
    after = shared.put(Request(512, seed=1), reach=ON_PEER)
    job = stepped.compute(after)
    shared.fetch()
    stepped.check(job, after)


def test_steps_that_do_not_share_the_columns_evenly(stepped: Bench, fake: Fake) -> None:
    fake.serving(0)
    with pytest.raises(stepped.extension.DeviceError, match="3 steps for 512 columns"):
        stepped.add(512, FP8, BF16, steps=3)


@pytest.mark.parametrize("nth", range(1, 13))
@pytest.mark.parametrize(
    "name",
    [
        "cuMemcpyHtoDAsync",
        "cuMemcpyDtoDAsync",
        "cuMemcpyDtoHAsync",
        "cuEventRecord",
        "cuStreamWaitEvent",
        "cuStreamWriteValue32",
        "cuGraphExecKernelNodeSetParams",
        "cuGraphLaunch",
    ],
)
def test_a_call_for_a_part_that_fails(
    make: Callable[..., Bench], fake: Fake, shared: Shared, name: str, nth: int
) -> None:
    bench = make(**IN_PARTS)

    def requests() -> list[Request]:
        return [Request(150, reply_dtype=FP32), shared.put(Request(100, reply_dtype=FP32, seed=1))]

    bench.compute(*requests())
    fake.called()
    fake.fail(name.encode(), nth, OUT_OF_MEMORY)
    failed = bench.start(*requests(), layer=1)
    struck = len([call for call in fake.called() if call.split()[0] == name]) >= nth
    fake.run()
    assert drained(bench, 20 * MS) == [failed]
    assert re.fullmatch(OUT_OF_MEMORY_SAID if struck else "", failed.error)
    fake.forget_failures()
    after = requests()
    job = bench.compute(*after)
    shared.fetch()
    bench.check(job, *after)


def test_a_batch_whose_launch_failed_comes_back_after_its_copies(make: Callable[..., Bench], fake: Fake) -> None:
    bench = make(piece_bytes=64 << 10)
    bench.rig.hold_copies(True)
    failed = bench.start(Request(512, hidden_dtype=BF16))
    bench.rig.go_copy()
    fake.fail(b"cuMemcpyHtoDAsync", 1, OUT_OF_MEMORY)
    assert bench.rig.poll(0) is None
    fake.run()
    assert drained(bench, 20 * MS) == []
    bench.rig.go_copies()
    assert drained(bench, 40 * MS) == [failed]
    bench.rig.hold_copies(False)
    request = Request(512)
    bench.check(bench.compute(request), request)


def test_a_layer_that_the_device_does_not_have(bench: Bench) -> None:
    job = bench.job(Request(5))
    job.forget_weights()
    bench.rig.start(job, 0)
    assert bench.rig.poll(0) is job
    assert job.error == "layer 7 is not on the device"


def test_python_computes_until_an_engine_takes_the_executor(bench: Bench) -> None:
    executor = bench.rig.executor
    requests = [Request(5), Request(300, seed=1), Request(7, seed=2)]
    layer = bench.layers[0].addresses

    def start(request: Request) -> Any:  # noqa: ANN401
        return executor.start(layer, FP8, BF16, WIDTH, [request.part], request)

    ending = threading.Event()

    def device() -> None:
        while not ending.is_set():
            bench.fake.run()
            time.sleep(0.001)

    thread = threading.Thread(target=device)
    runs = [start(request) for request in requests]
    thread.start()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(executor.wait, reversed(runs)))
    for request, run in zip(requests, runs, strict=True):
        request.check(bench.layers[0])
        assert run.pairs == np.bincount(request.ids[request.ids >= 0], minlength=EXPERTS).tolist()
        assert min(run.seconds) > 0
        assert run.elapsed > 0
    last = start(requests[2])
    executor.drain()
    executor.wait(last)
    ending.set()
    thread.join()
    requests[2].check(bench.layers[0])


def test_an_engine_computes_with_it(bench: Bench, shared: Shared) -> None:
    engine = bench.extension.EngineRig(bench.rig, bench.layers[1].addresses, HIDDEN)
    with pytest.raises(RuntimeError, match="an engine has the executor"):
        _ = bench.rig.executor.depth
    requests = [Request(300), Request(200, seed=1), shared.put(Request(64, seed=2)), Request(5, reply_dtype=FP32)]
    answers = [engine.submit(one.part, FP8, one.reply_dtype, WIDTH, EXPERTS) for one in requests]
    for now in range(4):
        engine.turn(now * MS)
        bench.fake.run()
    assert [answer.error for answer in answers] == [""] * 4
    assert all(answer.answered for answer in answers)
    shared.fetch()
    for request in requests:
        request.check(bench.layers[1])
    bench.fake.serving(0)
    del engine


def from_e4m3(codes: np.ndarray) -> np.ndarray:
    exponents, mantissas = codes >> 3 & 15, (codes & 7).astype(np.float32)
    sizes = np.where(exponents > 0, (8 + mantissas) * 2.0 ** (exponents.astype(np.int32) - 10), mantissas / 512)
    return np.where(codes & 0x80, -sizes, sizes)


@pytest.mark.parametrize("reply_dtype", [BF16, FP32])
def test_small_requests_do_not_wait_for_large_ones_that_have_all_places(bench: Bench, reply_dtype: int) -> None:
    assert bench.rig.executor.depth == 2
    engine = bench.extension.EngineRig(bench.rig, bench.layers[1].addresses, HIDDEN)
    submit = partial(submitted, engine, reply_dtype)
    large = [submit(tokens, seed=tokens) for tokens in (300, 400, 500)]
    engine.turn(0)
    for turn in range(1, 20):
        small = [submit(tokens, seed=100 * turn + tokens) for tokens in (turn, 8, 200)]
        engine.turn(turn)
        while bench.fake.step(EXPRESS):
            pass
        engine.turn(turn)
        for request, answer in small:
            assert (answer.answered, answer.error) == (True, "")
            request.check(bench.layers[1])
    assert not any(answer.answered for _, answer in large)
    for turn in range(3):
        bench.fake.run()
        engine.turn(MS + turn)
    for request, answer in large:
        assert (answer.answered, answer.error) == (True, "")
        request.check(bench.layers[1])
    bench.fake.serving(0)
    del engine


def submitted(engine: Any, reply_dtype: int, tokens: int, seed: int) -> tuple[Request, Any]:  # noqa: ANN401
    request = Request(tokens, reply_dtype=reply_dtype, seed=seed)
    return request, engine.submit(request.part, FP8, reply_dtype, WIDTH, EXPERTS)


def test_without_an_express_stream_small_requests_join_large_ones(make: Callable[..., Bench]) -> None:
    bench = make(express_rows=0, max_tokens=2048)
    engine = bench.extension.EngineRig(bench.rig, bench.layers[1].addresses, HIDDEN)
    answers = [submitted(engine, BF16, tokens, seed=tokens) for tokens in (300, 400, 300, 5)]
    engine.turn(0)
    for turn in range(2):
        assert not any(answer.answered for _, answer in answers[2 * turn :])
        bench.fake.run()
        engine.turn(MS + turn)
    assert [answer.answered for _, answer in answers] == [True] * 4
    bench.fake.serving(0)
    del engine


def test_sums_that_are_to_be_rounded_come_by_staging_even_for_pinned_callers(
    bench: Bench, fake: Fake, pinned: list[Request]
) -> None:
    engine = bench.extension.EngineRig(bench.rig, bench.layers[1].addresses, HIDDEN)
    requests = [pin(fake, pinned, Request(tokens, reply_dtype=FP8)) for tokens in (300, 5)]
    answers = [engine.submit(one.part, FP8, FP8, WIDTH, EXPERTS) for one in requests]
    for now in range(4):
        engine.turn(now * MS)
        bench.fake.run()
    assert [(answer.answered, answer.error) for answer in answers] == [(True, "")] * 2
    for request in requests:
        routed, end = (request.ids >= 0).any(axis=1), request.tokens * HIDDEN
        exact = request.expected(bench.layers[1]).view(np.float32).reshape(-1, HIDDEN // 128, 128)
        written = request.sums.reshape(-1).view(np.uint8)
        scales = written[end : end + end // 32].view(np.float32).reshape(request.tokens, -1)
        found = from_e4m3(written[:end]).reshape(exact.shape) * scales[..., None]
        largest = np.abs(exact).max(axis=2)
        assert np.array_equal(scales[routed], (largest / np.float32(448))[routed])
        assert (np.abs(found - exact) <= largest[..., None] / 28)[routed].all()
        assert (written[end + end // 32 :].view(np.uint32) == 0xABAB).all()
    bench.fake.serving(0)
    del engine


def test_an_engines_thread_looks_when_a_batch_is_due_and_when_copies_are_made(make: Callable[..., Bench]) -> None:
    bench = make(piece_bytes=64 << 10)
    bench.rig.hold_copies(True)
    engine = bench.extension.EngineRig(bench.rig, bench.layers[1].addresses, HIDDEN)
    engine.start()
    for turn in range(3):
        request = Request(512, seed=turn)
        answer = engine.submit(request.part, FP8, BF16, WIDTH, EXPERTS)
        deadline = time.monotonic() + 5
        while not answer.answered and time.monotonic() < deadline:
            time.sleep(0.005)
            bench.rig.go_copies()
            time.sleep(0.005)
            bench.fake.run()
        assert answer.answered
        assert answer.error == ""
        request.check(bench.layers[1])
    bench.fake.serving(0)
    del engine


CONSTRUCTION = {
    "cuInit": 1,
    "cuDevicePrimaryCtxRetain": 1,
    "cuDeviceGetAttribute": 1,
    "cuCtxSetCurrent": 1,
    "cuStreamCreateWithPriority": 4,
    "cuMemHostAlloc": 9,
    "cuMemAlloc": 6,
    "cuEventCreate": 24,
}


@pytest.mark.parametrize(("name", "nth"), [(name, nth) for name, count in CONSTRUCTION.items() for nth in {1, count}])
def test_construction_that_fails_leaves_nothing(built: Built, fake: Fake, name: str, nth: int) -> None:
    before = fake.alive()
    fake.fail(name.encode(), nth, OUT_OF_MEMORY)
    with pytest.raises(built.extension.DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY: out of memory"):
        built.extension.Rig(str(built.library), 0, 2, (HIDDEN, EXPERTS, WIDTH), CLASSES)
    assert fake.alive() == before


@pytest.mark.parametrize(
    "name",
    [
        "cuGraphClone",
        "cuGraphGetNodes",
        "cuGraphNodeGetType",
        "cuGraphKernelNodeGetParams",
        "cuFuncGetParamInfo",
        "cuKernelGetParamInfo",
        "cuGraphInstantiateWithFlags",
        "cuGraphUpload",
    ],
)
def test_a_graph_that_cannot_be_taken_leaves_nothing(bench: Bench, name: str) -> None:
    bench.fake.serving(0)
    before = bench.fake.alive()
    bench.fake.fail(name.encode(), 1, OUT_OF_MEMORY)
    with pytest.raises(bench.extension.DeviceError):
        bench.add(8, FP8, BF16)
    bench.fake.forget_graphs()
    assert bench.fake.alive() == before
    request = Request(5)
    bench.check(bench.compute(request), request)


def test_graphs_hold_kernels_copies_and_fills_alone(bench: Bench) -> None:
    bench.fake.serving(0)
    for odd in (1, 2, 5):
        bench.add(8, FP8, BF16, odd=odd)
    with pytest.raises(bench.extension.DeviceError, match="a captured graph holds a node of type 3"):
        bench.add(8, FP8, BF16, odd=3)
    bench.fake.forget_graphs()


def test_a_graph_that_is_not_given_the_layer_is_refused(bench: Bench) -> None:
    bench.fake.serving(0)
    with pytest.raises(bench.extension.DeviceError, match="no captured kernel is given up_gate"):
        bench.add(8, FP8, BF16, layer=1)
    bench.fake.forget_graphs()


def test_what_adds_is_one_kernel_that_is_given_all_of_it(bench: Bench) -> None:
    bench.fake.serving(0)
    result, *parts = (4096 * number for number in range(1, 4))
    adder = bench.fake.adder(ctypes.c_uint64(1 << 52), (ctypes.c_uint64 * 2)(*parts), 2, HIDDEN, 1)
    none = (ctypes.c_uint64 * 4)()
    many = bench.fake.graph(*[ctypes.c_uint64(0)] * 6, none, 1, WIDTH, HIDDEN, EXPERTS, 1, -1, 0, 1)
    for graph, refusal in ((adder, "is given result"), (many, "holds other than one kernel: 3 nodes")):
        with pytest.raises(bench.extension.DeviceError, match=refusal):
            bench.rig.executor.add_adder(FP32, graph=graph, result=(result, 64), parts=[(part, 64) for part in parts])
    bench.fake.forget_graphs()


@pytest.mark.skipif(find_spec("nvidia") is None, reason="needs cuda.h, from NVIDIA's package for Python")
def test_declarations_agree_with_those_of_cuda(tmp_path: Path) -> None:
    spec = find_spec("nvidia")
    assert spec is not None
    headers = [found.parent for root in spec.submodule_search_locations or () for found in Path(root).rglob("cuda.h")]
    if not headers:
        pytest.skip("this package of NVIDIA's has no cuda.h")
    build_library(tmp_path / "libnone.so", [ROOT / "tests/native/declarations.cc"], "-isystem", str(headers[0]))


def test_no_driver_and_an_old_one(built: Built, tmp_path: Path) -> None:
    shape = (HIDDEN, EXPERTS, WIDTH)
    with pytest.raises(built.extension.DeviceError, match="no CUDA driver: "):
        built.extension.Rig(str(tmp_path / "none.so"), 0, 2, shape, CLASSES)
    source = tmp_path / "empty.cc"
    source.write_text("")
    old = build_library(tmp_path / "libold.so", [source])
    with pytest.raises(built.extension.DeviceError, match=r"libold.so is older than CUDA 12.0"):
        built.extension.Rig(str(old), 0, 2, shape, CLASSES)


@pytest.mark.skipif(sanitized, reason="this is the run with sanitizers")
def test_with_sanitizers() -> None:
    # With libstdc++, or the sanitizer would not find what it wraps of exceptions.
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "EXPERTD_SANITIZED": "1",
        "LD_PRELOAD": " ".join(libraries),
        # Python itself leaks; what the executor leaves behind is counted by the fake driver.
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-s",
        "--noconftest",
        "-p",
        "no:cacheprovider",
        str(Path(__file__)),
        str(Path(__file__).with_name("node") / "test_node.py"),
    ]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
