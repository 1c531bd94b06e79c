"""What kernels of stream-ordered calls read and write on the device, beside the tensors of calls."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertd.client.stream import kernels
from expertd.client.stream.lane import StreamLane
from expertd.client.stream.terms import Terms


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
        places = torch.zeros(self.places.shape, dtype=torch.int64, device="cpu")
        places[: len(lanes)] = torch.from_numpy(np.stack([lane.places() for lane in lanes]))
        self.places.copy_(places)
        self.owners.copy_(owners)
        for counts in (self.tails, self.sent, self.verdicts):
            counts.zero_()
