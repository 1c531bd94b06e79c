"""A device that hangs until it is told to go on."""

import threading
from collections.abc import Mapping

from expertd.kernels.numerics.backend import LayerWeights
from expertd.kernels.torch.backend import TorchBackend


class Hanging(TorchBackend):
    """Does not come back from what is asked of it until it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.go_on = threading.Event(), threading.Event()

    def _hang(self) -> None:
        self.asked.set()
        assert self.go_on.wait(30)

    def drop_layer(self, layer: int) -> None:
        self._hang()

    def memory(self) -> None:
        self._hang()

    def splice_layer(self, layer: int, base: int | None, kept: Mapping[int, int], added: LayerWeights) -> None:
        self._hang()

    def synchronize(self) -> None:
        self._hang()
