"""Requests whose tensors lie in shared memory."""

from __future__ import annotations

from expertd.proto.base.errors import InvalidBatch
from expertd.proto.codec.raw import RawRequest
from expertd.proto.codec.tensors import HIDDEN_DTYPES, REPLY_DTYPES, Bytes, check_dtype
from expertd.proto.lane.layout import Layout, SharedSegment, lay_out


def segment_layout(request: RawRequest, width: int) -> Layout | None:
    """Where the tensors of `request` belong in a segment; None for one that is to be refused, or has none."""
    if request.segment_offset is not None or request.gpu_offset is not None or not request.hidden:
        return None
    try:
        hidden_dtype = check_dtype("hidden_dtype", request.hidden_dtype, HIDDEN_DTYPES)
        reply_dtype = check_dtype("reply_dtype", request.reply_dtype, REPLY_DTYPES)
    except InvalidBatch:
        return None
    layout = lay_out(0, None, request.num_tokens, width, request.top_k, hidden_dtype, reply_dtype)
    tensors = (request.hidden, request.hidden_scales, request.expert_ids, request.weights)
    places = (layout.hidden, layout.hidden_scales, layout.expert_ids, layout.weights)
    fits = all(len(tensor) == place.stop - place.start for tensor, place in zip(tensors, places, strict=True))
    return layout if fits else None


def tensors_in(message: RawRequest, segment: SharedSegment, layout: Layout) -> tuple[Bytes, ...]:
    """Hidden states, scales, ids and weights from `segment`, which the caller can change at any time, and the partials.

    What is checked is copied first: ids, weights, and scales that are not on a GPU. Everything else is read in place:
    every byte of it is a value, and a token's values reach no other token's result.
    """
    if message.segment_offset is None:
        raise InvalidBatch("segment_offset is missing; tensors of this connection lie in its segment")
    if message.hidden or message.hidden_scales or message.expert_ids or message.weights:
        raise InvalidBatch("hidden, hidden_scales, expert_ids and weights must be empty beside segment_offset")
    memory, gpu = segment.memory, segment.gpu
    _check_end("segment_offset", message.segment_offset, layout.end, len(memory))
    ids, weights = (memoryview(bytes(memory[place])) for place in (layout.expert_ids, layout.weights))
    if not layout.on_gpu:
        scales = memoryview(bytes(memory[layout.hidden_scales]))
        return memory[layout.hidden], scales, ids, weights, memory[layout.partials]
    if gpu is None:
        raise InvalidBatch(f"gpu_offset is {message.gpu_offset}; no GPU memory was handed over with the segment")
    _check_end("gpu_offset", message.gpu_offset, layout.gpu_end, len(gpu))
    return gpu[layout.hidden], gpu[layout.hidden_scales], ids, weights, gpu[layout.partials]


def _check_end(field: str, offset: int | None, end: int, size: int) -> None:
    if end > size:
        what = "segment" if field == "segment_offset" else "GPU memory"
        raise InvalidBatch(f"{field} is {offset} and the call's tensors end at byte {end}; the {what} has {size}")
