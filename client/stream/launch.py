"""One stream-ordered call, kernel by kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from expertd.client.stream import kernels
from expertd.client.stream.lane import StreamLane
from expertd.client.stream.tables import Tables
from expertd.client.stream.terms import Terms, slot_bytes
from expertd.kernels.numerics.quantize import FP8

FEW_TOKENS = 256
"""Up to so many are given to every server whole, which takes less time than to find out what it wants of them."""
CHUNK = 512
COLUMNS = 1024
"""Tokens and columns that kernels take at once."""


def enqueue(
    terms: Terms,
    tables: Tables,
    lanes: Sequence[StreamLane],
    layer: int,
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    out: Tensor,
) -> None:
    """Have the device's current stream make a call: of hidden [..., H], ids and weights [..., k], into `out` [..., H].

    All are contiguous and were checked; `layer` is its row in the tables.
    """
    top_k, tokens = ids.shape[-1], hidden.numel() // terms.width
    servers, classes, simulated = tables.servers, len(terms.sizes), terms.device.type == "cpu"
    compact = servers > 1 and tokens > FEW_TOKENS
    size = next(index for index, size in enumerate(terms.sizes) if tokens <= size)
    wide, blocks = _power_of_two(top_k), terms.width // kernels.BLOCK.value
    quantized = terms.hidden_dtype == FP8
    places, owners, rows, chosen = tables.places, tables.owners, tables.rows, tables.chosen
    if compact:
        kernels.compact[(servers,)](
            ids,
            owners,
            places,
            rows,
            chosen,
            tokens,
            layer,
            blocks if quantized else 0,
            top_k,
            terms.experts,
            classes,
            wide,
            CHUNK,
        )
    sent = tokens if compact else terms.sizes[size]
    groups = -(-sent // kernels.GROUP.value)
    kernels.dispatch[(groups + sent, servers)](
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
        _power_of_two(blocks),
        quantized,
        compact,
        num_warps=8,
    )
    posted = places, tables.tails, chosen, tables.sent, tables.verdicts, layer, size, slot_bytes(terms)
    kernels.post[(servers,)](*posted, servers, classes, compact, simulated, num_warps=1)
    for lane in lanes:
        lane.wait()
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


def _power_of_two(number: int) -> int:
    """The smallest that is not less."""
    return 1 << (number - 1).bit_length()
