"""GPUs of the fake driver (tests/native/fake_cuda.cc): commanding it, requests, and layers of four small experts."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.native.build import ROOT, build_cuda_extension, build_library

HIDDEN, EXPERTS, WIDTH = 512, 4, 4
CLASSES = (1, 8, 64, 256, 512)
FP8, BF16, FP32 = 1, 2, 3
PAGEABLE, PINNED, ON_DEVICE, ON_PEER = range(4)
MS = 1_000_000


class Fake:
    """The fake driver, as tests command it."""

    def __init__(self, library: Path) -> None:
        self._calls = ctypes.CDLL(str(library))
        for name in ("fake_waiting", "fake_calls", "fake_breaches"):
            getattr(self._calls, name).restype = ctypes.c_char_p
        for name in ("fake_graph", "fake_adder", "fake_device_bytes"):
            getattr(self._calls, name).restype = ctypes.c_void_p
        for name in ("fake_device_floats", "fake_share"):
            getattr(self._calls, name).restype = ctypes.c_uint64
        self._calls.fake_reset()

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._calls, "fake_" + name)

    def called(self) -> list[str]:
        """The calls since the last question."""
        return str(self.calls().decode()).splitlines()

    def queue(self, stream: int) -> list[str]:
        return str(self.waiting(stream).decode()).split()

    def add_graphs(
        self,
        executor: Any,  # noqa: ANN401
        layer: Sequence[int],
        tokens: int,
        hidden: int,
        reply: int,
        *,
        given: Sequence[int] | None = None,
        odd: int = -1,
        steps: int = 1,
    ) -> None:
        """Give an executor what computes a class of sizes, as captured with a layer at these addresses; with an `odd`
        node among them, or with kernels that are `given` other addresses than that."""
        at = executor.places(bay=0, tokens=tokens, hidden_dtype=hidden, reply_dtype=reply)
        places = [ctypes.c_uint64(at[name]) for name in ("ids", "weights", "hidden", "scales", "pairs", "sums")]
        weights = (ctypes.c_uint64 * 4)(*(layer if given is None else given))
        sizes = (tokens, WIDTH, HIDDEN, EXPERTS, int(reply == FP32))
        graphs = [self.graph(*places, weights, *sizes, odd, step, steps) for step in range(steps)]
        executor.add_graphs(tokens, hidden, reply, graphs, [(address, 4 * EXPERTS) for address in layer])


@dataclass(frozen=True)
class Built:
    extension: Any
    library: Path
    """The fake driver."""


def build_fake(folder: Path, *options: str) -> Built:
    """The executor and the driver that it is to find, compiled with `options`."""
    library = build_library(
        folder / "libfake.so", [ROOT / "tests/native/fake_cuda.cc"], *options, "-fvisibility=default"
    )
    return Built(build_cuda_extension(folder, *options), library)


@dataclass
class Request:
    """One request, its memory, and the sums that the fake kernels should give it."""

    tokens: int
    hidden_dtype: int = FP8
    reply_dtype: int = BF16
    top_k: int = WIDTH
    reach: int = PAGEABLE
    seed: int = 0
    rows: tuple[int, int, int] = field(init=False)
    """Where hidden states and scales are, and where the sums go."""
    hidden: np.ndarray = field(init=False)
    sums: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        random = np.random.default_rng(self.seed + 1000 * self.tokens)
        dtype = np.uint8 if self.hidden_dtype == FP8 else np.uint16
        self.hidden = random.integers(0, 200, (self.tokens, HIDDEN), dtype=dtype)
        self.scales = random.random((self.tokens, HIDDEN // 128), dtype=np.float32)
        order = random.random((self.tokens, EXPERTS + 2)).argsort(1)[:, : self.top_k]
        self.ids = np.where(order < EXPERTS, order, -1).astype(np.int32)
        self.weights = random.random((self.tokens, self.top_k), dtype=np.float32)
        # A row more than there are: who writes it, writes past the end.
        kind = np.uint16 if self.reply_dtype == BF16 else np.uint32
        self.sums = np.full((self.tokens + 1, HIDDEN), 0xABAB, dtype=kind)
        scales = self.scales.ctypes.data if self.hidden_dtype == FP8 else 0
        self.rows = (self.hidden.ctypes.data, scales, self.sums.ctypes.data)

    @property
    def part(self) -> tuple[int, int, int, int, int, int, int]:
        hidden, scales, sums = self.rows
        return (hidden, scales, self.ids.ctypes.data, self.weights.ctypes.data, sums, self.tokens, self.reach)

    def only(self, experts: Collection[int]) -> Request:
        """The same with the pairs of some experts alone, and sums of its own."""
        part = dataclasses.replace(self)
        part.ids = np.where(np.isin(self.ids, list(experts)), self.ids, -1).astype(np.int32)
        return part

    def expected(self, layer: Layer, *, zeros: bool = False) -> np.ndarray:
        """`zeros`: of rows without an expert."""
        values = self.hidden.astype(np.float32)
        if self.hidden_dtype == FP8:
            values *= self.scales.repeat(128, 1)
        total = np.zeros_like(values)
        up_gate, up_scales, down, down_scales = layer.values
        for slot in range(self.top_k):
            ids, weights = self.ids[:, slot, None], self.weights[:, slot, None]
            term = weights * (values * up_gate[ids] * up_scales[ids] + down[ids] * down_scales[ids])
            total = np.where(ids >= 0, total + term, total)
        bits = total.view(np.uint32)
        bits = (bits >> 16).astype(np.uint16) if self.reply_dtype == BF16 else bits
        if zeros:
            return bits
        # The fake leaves rows without an expert as they are, whatever that is.
        routed = (self.ids >= 0).any(axis=1, keepdims=True)
        return np.where(routed, bits, self.sums[:-1])

    def check(self, layer: Layer) -> None:
        assert np.array_equal(self.sums[:-1], self.expected(layer))
        assert (self.sums[-1] == 0xABAB).all()


class Layer:
    def __init__(self, fake: Fake, seed: int, values: list[np.ndarray] | None = None) -> None:
        random = np.random.default_rng(seed)
        self.values = values or [random.random(EXPERTS, dtype=np.float32) for _ in range(4)]
        self.addresses = [
            fake.device_floats(value.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), EXPERTS) for value in self.values
        ]

    def only(self, fake: Fake, experts: Collection[int]) -> Layer:
        """What a device has that holds some experts, by their places among them."""
        kept = list(experts)
        return Layer(fake, 0, [np.resize(value[kept], EXPERTS) for value in self.values])
