"""Several devices as one executor: by threads, and as GPUs on the fake driver, whose sums are added on them or here."""

import ctypes
import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.support.native.build import SANITIZED
from tests.support.native.fake_gpu import (
    BF16,
    CLASSES,
    EXPERTS,
    FP8,
    FP32,
    HIDDEN,
    MS,
    WIDTH,
    Built,
    Fake,
    Layer,
    Request,
    build_fake,
)

sanitized = bool(os.environ.get("EXPERTD_SANITIZED"))
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
HALVES = ((0, 1), (2, 3))
ILLEGAL_ADDRESS = 700
STREAMS = 4
"""Of each device."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build_fake(tmp_path_factory.mktemp("native"), *(SANITIZED if sanitized else ("-O1",)))


class Node:
    """GPUs that have some of four experts each, `held`, with graphs for every kind of batch, and an engine for them."""

    def __init__(
        self,
        built: Built,
        held: tuple[tuple[int, ...], ...],
        reachable: bool = True,
        classes: tuple[int, ...] = CLASSES,
        max_tokens: int = 1024,
    ) -> None:
        self.fake = Fake(built.library)
        self.fake.reachable(int(reachable))
        self.fake.zeros(1)
        shape = (HIDDEN, EXPERTS, WIDTH)
        self.rigs = [
            built.extension.Rig(
                str(built.library), device, 2, shape, classes, overlap_tokens=256, max_tokens=max_tokens
            )
            for device in range(len(held))
        ]
        self.whole = Layer(self.fake, 1)
        layers = [self.whole.only(self.fake, its) for its in held]
        for rig, layer in zip(self.rigs, layers, strict=True):
            for tokens, dtypes in itertools.product(classes, itertools.product((FP8, BF16), (BF16, FP32))):
                self.fake.add_graphs(rig.executor, layer.addresses, tokens, *dtypes)
            for count, dtype in itertools.product(range(2, len(held) + 1), (BF16, FP32)):
                self._add_adder(rig, count, dtype)
        self.fake.forget_graphs()
        self.fake.run()
        devices = [(list(its), layer.addresses) for its, layer in zip(held, layers, strict=True)]
        self.engine = built.extension.EngineRig(self.rigs, devices, HIDDEN)
        self.now = 1
        self.fake.serving(1)

    def _add_adder(self, rig: Any, count: int, dtype: int) -> None:  # noqa: ANN401
        # Anywhere: it is told where they are.
        result, *parts = ((1 << 50) + 4096 * number for number in range(count + 1))
        graph = self.fake.adder(
            ctypes.c_uint64(result), (ctypes.c_uint64 * count)(*parts), count, HIDDEN, int(dtype == FP32)
        )
        rig.executor.add_adder(dtype, graph=graph, result=(result, 64), parts=[(part, 64) for part in parts])

    def submit(self, request: Request) -> Any:  # noqa: ANN401
        return self.engine.submit(request.part, request.hidden_dtype, request.reply_dtype, request.top_k, EXPERTS)

    def turn_until_called(self, name: str, times: int) -> None:
        """With the devices doing nothing from then on."""
        self.fake.called()
        called = 0
        while called < times:
            self.now += MS
            self.engine.turn(self.now)
            called += sum(call.startswith(name) for call in self.fake.called())
            if called < times:
                self.fake.run()

    def run_streams(self, device: int) -> None:
        """What waits on one device alone."""
        for stream in range(STREAMS * device, STREAMS * (device + 1)):
            while self.fake.step(stream):
                pass

    def turn(self, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not until():
            self.now += MS
            self.engine.turn(self.now)
            self.fake.run()
            assert time.monotonic() < deadline

    def compute(self, *requests: Request) -> list[str]:
        """Their errors."""
        jobs = [self.submit(request) for request in requests]
        self.turn(lambda: all(job.answered for job in jobs))
        return [job.error for job in jobs]

    def close(self) -> None:
        self.fake.serving(0)
        del self.engine
        for rig in self.rigs:
            rig.close()


@pytest.fixture
def node(built: Built) -> Iterator[Callable[..., Node]]:
    made: list[Node] = []

    def make(held: tuple[tuple[int, ...], ...] = HALVES, **options: Any) -> Node:  # noqa: ANN401
        made.append(Node(built, held, **options))
        return made[0]

    yield make
    breaches = made[0].fake.breaches().decode()
    made[0].close()
    assert breaches == ""


def expected(request: Request, whole: Layer, held: tuple[tuple[int, ...], ...]) -> np.ndarray:
    """Each device's sums in FP32, added in the order of devices, and rounded as the fake does."""
    total = np.zeros((request.tokens, HIDDEN), np.float32)
    for its in held:
        part = request.only(its)
        part.reply_dtype = FP32
        sums = part.expected(whole, zeros=True).view(np.float32)
        total = total + sums
    bits = total.view(np.uint32)
    return (bits >> 16).astype(np.uint16) if request.reply_dtype == BF16 else bits


@pytest.mark.parametrize("reply", [BF16, FP32])
@pytest.mark.parametrize("tokens", [1, 5, 64, 300, 1000])
def test_gpus_that_reach_each_other_add_their_sums(node: Callable[..., Node], tokens: int, reply: int) -> None:
    its = node()
    assert its.engine.adds_on_devices
    request = Request(tokens, reply_dtype=reply, reach=0)
    assert its.compute(request) == [""]
    assert np.array_equal(request.sums[:-1], expected(request, its.whole, HALVES))
    assert (request.sums[-1] == 0xABAB).all()


def test_sizes_in_any_order_and_with_the_next_part_launched_before_the_last_ended(node: Callable[..., Node]) -> None:
    its = node()
    for seed, tokens in enumerate((64, 1000, 5, 1000, 300, 64)):
        request = Request(tokens, reply_dtype=FP32, seed=seed)
        assert its.compute(request) == [""]
        assert np.array_equal(request.sums[:-1], expected(request, its.whole, HALVES))


def test_there_is_room_for_half_of_an_odd_number_of_rows(node: Callable[..., Node]) -> None:
    its = node(classes=(1, 3), max_tokens=3)
    request = Request(3, reply_dtype=FP32)
    assert its.compute(request) == [""]
    assert np.array_equal(request.sums[:-1], expected(request, its.whole, HALVES))


def test_many_requests_at_once_on_three_gpus(node: Callable[..., Node]) -> None:
    held = ((0,), (1, 2), (3,))
    its = node(held)
    requests = [Request(tokens, seed=tokens) for tokens in (1, 2, 3, 100, 7, 400, 5, 60)]
    assert its.compute(*requests) == [""] * len(requests)
    for request in requests:
        assert np.array_equal(request.sums[:-1], expected(request, its.whole, held))


def test_gpus_that_do_not_have_their_sums_added_here(node: Callable[..., Node]) -> None:
    its = node(reachable=False)
    assert not its.engine.adds_on_devices
    request = Request(300, reply_dtype=FP32)
    assert its.compute(request) == [""]
    assert np.array_equal(request.sums[:-1], expected(request, its.whole, HALVES))


def test_what_one_gpu_has_needs_no_adding(node: Callable[..., Node]) -> None:
    its = node()
    request = Request(64).only((2, 3))
    its.fake.called()
    assert its.compute(request) == [""]
    assert sum(call.startswith("cuGraphLaunch") for call in its.fake.called()) == 1
    assert np.array_equal(request.sums[:-1], expected(request, its.whole, HALVES))


@pytest.mark.parametrize(
    "name", ["cuGraphLaunch", "cuLaunchKernel", "cuMemcpyDtoHAsync", "cuMemcpyHtoDAsync", "cuStreamWriteValue32"]
)
def test_a_call_that_fails_leaves_the_batch_to_others(node: Callable[..., Node], name: str) -> None:
    held = ((0, 1, 2, 3), (0, 1, 2, 3))
    its = node(held)
    for nth in range(1, 12):
        its.fake.fail(name.encode(), nth, 2)
        request = Request(64, reply_dtype=FP32, seed=nth)
        (error,) = its.compute(request)
        its.fake.forget_failures()
        # A failed call fails its batch alone.
        refused = r"device 0: the device failed: CUDA_ERROR_OUT_OF_MEMORY: out of memory \(\w+\.(cc|h):\d+\)"
        assert error == "" or re.fullmatch(refused, error) or "device 1" in error
        assert its.compute(again := Request(64, reply_dtype=FP32, seed=nth)) == [""]
        assert np.isfinite(again.sums[:-1].view(np.float32)).all()


def test_a_gpu_that_is_lost_leaves_its_experts_to_those_with_copies(node: Callable[..., Node]) -> None:
    its = node(((0, 1, 2, 3), (0, 1, 2, 3)))
    its.fake.sticky_device(1)
    job = its.submit(request := Request(64, reply_dtype=FP32))
    its.engine.turn(1)
    its.fake.sticky(ILLEGAL_ADDRESS)
    its.turn(lambda: job.answered)
    assert job.error == ""
    assert np.array_equal(request.sums[:-1], expected(request, its.whole, ((0, 1, 2, 3), ())))
    assert "device 1: the device failed: CUDA_ERROR_ILLEGAL_ADDRESS" in its.engine.take_fault()
    its.engine.lose(1, False)
    assert its.compute(Request(64)) == [""]
    its.fake.sticky(0)


@pytest.mark.parametrize("tokens", [64, 300])
def test_a_gpu_that_hangs_while_it_adds_keeps_no_caller_and_no_place_of_another(
    node: Callable[..., Node], tokens: int
) -> None:
    its = node()
    job = its.submit(given_up := Request(tokens, reply_dtype=FP32))
    its.turn_until_called("cuLaunchKernel", 2)
    its.engine.lose(1, True)
    its.engine.turn(its.now)
    assert (job.answered, job.error) == (True, "device 1 is lost; use another replica")
    requests = [Request(tokens, seed=seed).only((0, 1)) for seed in range(4)]
    later = [its.submit(request) for request in requests]
    deadline = time.monotonic() + 20
    while not all(one.answered for one in later):
        its.now += MS
        its.engine.turn(its.now)
        its.run_streams(0)
        assert time.monotonic() < deadline
    assert [one.error for one in later] == [""] * len(later)
    for request in requests:
        assert np.array_equal(request.sums[:-1], expected(request, its.whole, HALVES))
    # The device goes on after all: it may still write there.
    its.fake.run()
    assert its.compute(request := Request(tokens).only((0, 1))) == [""]
    assert (given_up.sums[-1] == 0xABAB).all()


def test_what_a_lost_gpu_alone_had_is_refused(node: Callable[..., Node]) -> None:
    its = node()
    its.engine.lose(1, False)
    (error,) = its.compute(Request(64))
    assert error == "layer 7: a device that had its experts is lost; ask GetShard"
    assert its.compute(Request(64).only((0, 1))) == [""]
