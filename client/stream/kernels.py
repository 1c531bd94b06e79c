"""What a caller's GPU does for a stream-ordered call: quantise and dispatch, post and wait, combine.

Triton kernels: in graphs they advance by themselves, as all that changes from call to call lies in memory. Their
arguments' names: T tokens, H hidden size, E experts of the model, S servers, C size classes; `places` is [S, C, FIELDS]
int64, see `Field`. The lane's words are those of native/lane/ring.h.
"""

from __future__ import annotations

import triton
import triton.language as tl

BASE, ENTRIES, SLOTS, TOKENS, HIDDEN, SCALES, IDS, WEIGHTS, PARTIALS = (tl.constexpr(field) for field in range(9))
FIELDS = tl.constexpr(9)
"""Of a server and a size class: the segment's address, the entries of its ring, the offset in it of the first
layer's slot, the tokens of the
class, the addresses of the call's tensors."""
OVER, TOLD, TOLD_SLOT, ENDED = (tl.constexpr(at) for at in (384, 448, 456, 512))
"""Words of the segment that server and ring leave alone. From the host: u32, not 0 once nothing is waited for any more.
To it: u32 verdict on the first call that failed since it was 0, with u64 slot; u32 calls that are over."""
NOT_ASKED, RECEIPT_DIFFERS, NOBODY_ANSWERS, NOBODY_OWNS = (tl.constexpr(verdict) for verdict in (-1, 100, 101, 102))
"""Verdicts beside 0, answered, and the codes of gRPC."""
TAIL, ANSWERED, CODE, RECEIPT = (tl.constexpr(at) for at in (64, 320, 16, 20))
RING, ENTRY_BYTES, REQUEST, POSTED, DONE = (tl.constexpr(word) for word in (4096, 16, 1, 1, 4))
GROUP = tl.constexpr(128)
BLOCK, FP8_MAX, LEAST_AMAX = tl.constexpr(128), tl.constexpr(448.0), tl.constexpr(1e-10)


@triton.jit
def _word(address):
    return address.to(tl.pointer_type(tl.int32))


@triton.jit
def _fence(SIMULATED: tl.constexpr):
    """What was written before it is seen by every process before what is written after it; of reads likewise."""
    if not SIMULATED:
        tl.inline_asm_elementwise("fence.acq_rel.sys; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _place(places, server, size_class, C: tl.constexpr):
    return places + (server * C + size_class) * FIELDS


@triton.jit
def _receipt_term(expert):
    """As in ring.h."""
    term = (expert + 1).to(tl.uint32)
    term = (term ^ (term >> 16)) * 0x85EBCA6B
    term = (term ^ (term >> 13)) * 0xC2B2AE35
    return (term ^ (term >> 16)).to(tl.int64)


@triton.jit
def _mine(ids, owners, token, tokens, server, top_k, E, K: tl.constexpr):
    """The experts of tokens, a number or [tokens, 1]; which of them are the server's, and which are nobody's."""
    lane = tl.arange(0, K)
    if len(token.shape) > 1:
        lane = lane[None, :]
    inside = lane < tl.where(token < tokens, top_k, 0)
    expert = tl.load(ids + token * top_k + lane, mask=inside, other=-1)
    known = inside & (expert >= 0) & (expert < E)
    owner = tl.load(owners + expert, mask=known, other=-1)
    return expert.to(tl.int32), known & (owner == server), inside & (expert != -1) & (owner == -1)


@triton.jit(do_not_specialize=["tokens", "layer", "blocks"])
def compact(
    ids,
    owners,
    places,
    rows,
    chosen,
    tokens,
    layer,
    blocks,
    top_k,
    E,
    C: tl.constexpr,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """For each server, `rows` [S, T] int32: which of its rows a token has, -1 for none; `chosen` [S] int32: the
    smallest size class that holds them, whose other rows name no experts. `blocks` is a row's scales. Grid (S,)."""
    server = tl.program_id(0)
    count = 0
    for begin in range(0, tokens, CHUNK):
        token = begin + tl.arange(0, CHUNK)
        _, mine, _ = _mine(ids, owners + layer * E, token[:, None], tokens, server, top_k, E, K)
        wanted = (tl.sum(mine.to(tl.int32), axis=1) > 0).to(tl.int32)
        row = tl.where(wanted > 0, count + tl.cumsum(wanted, 0) - 1, -1)
        tl.store(rows + server * tokens + token, row, mask=token < tokens)
        count += tl.sum(wanted)
    size_class = 0
    for smaller in range(C):
        size_class += (count > tl.load(_place(places, server, smaller, C) + TOKENS)).to(tl.int32)
    tl.store(chosen + server, size_class)
    place = _place(places, server, size_class, C)
    ids_there = tl.load(place + IDS).to(tl.pointer_type(tl.int32))
    weights_there = tl.load(place + WEIGHTS).to(tl.pointer_type(tl.float32))
    end = tl.load(place + TOKENS).to(tl.int32)
    for begin in range(count * top_k, end * top_k, CHUNK):
        at = begin + tl.arange(0, CHUNK)
        tl.store(ids_there + at, -1, mask=at < end * top_k)
        tl.store(weights_there + at, 0.0, mask=at < end * top_k)
    scales_there = tl.load(place + SCALES).to(tl.pointer_type(tl.float32))
    for begin in range(count * blocks, end * blocks, CHUNK):
        at = begin + tl.arange(0, CHUNK)
        tl.store(scales_there + at, 0.0, mask=at < end * blocks)


@triton.jit
def _quantize(hidden, place, token, row, H: tl.constexpr, BLOCKS: tl.constexpr):
    """The bits are those of `expertd.kernels.numerics.quantize.quantize_activations` on the CPU."""
    block = tl.arange(0, BLOCKS)
    at = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = tl.load(hidden + token.to(tl.int64) * H + at, mask=at < H, other=0.0).to(tl.float32)
    amax = tl.max(tl.abs(values), axis=1)
    # A maximum that keeps NaN.
    scale = tl.math.div_rn(tl.where(amax < LEAST_AMAX, LEAST_AMAX, amax), FP8_MAX)
    scaled = tl.math.div_rn(values, scale[:, None])
    hidden_there = tl.load(place + HIDDEN).to(tl.pointer_type(tl.float8e4nv))
    scales_there = tl.load(place + SCALES).to(tl.pointer_type(tl.float32))
    tl.store(hidden_there + row.to(tl.int64) * H + at, scaled.to(tl.float8e4nv), mask=at < H)
    tl.store(scales_there + row * (H // BLOCK) + block, scale, mask=block < H // BLOCK)


@triton.jit
def _clear_scales(place, row, H: tl.constexpr, BLOCKS: tl.constexpr):
    """Of a row that nobody wants: servers refuse NaN in any, which earlier calls may have left."""
    block = tl.arange(0, BLOCKS)
    scales_there = tl.load(place + SCALES).to(tl.pointer_type(tl.float32))
    tl.store(scales_there + row.to(tl.int64) * (H // BLOCK) + block, 0.0, mask=block < H // BLOCK)


@triton.jit
def _copy(hidden, place, token, row, H: tl.constexpr, BLOCKS: tl.constexpr):
    at = tl.arange(0, BLOCKS * BLOCK)
    there = tl.load(place + HIDDEN).to(tl.pointer_type(tl.bfloat16))
    values = tl.load(hidden + token.to(tl.int64) * H + at, mask=at < H)
    tl.store(there + row.to(tl.int64) * H + at, values.to(tl.bfloat16), mask=at < H)


@triton.jit
def _route(
    ids,
    weights,
    owners,
    place,
    rows,
    sent,
    first,
    tokens,
    server,
    top_k,
    E,
    S: tl.constexpr,
    K: tl.constexpr,
    COMPACT: tl.constexpr,
):
    """Ids and weights of GROUP tokens, in one piece: what goes to host memory in many costs far more."""
    token = first + tl.arange(0, GROUP)[:, None]
    lane = tl.arange(0, K)[None, :]
    expert, mine, stray = _mine(ids, owners, token, tokens, server, top_k, E, K)
    weight = tl.load(weights + token * top_k + lane, mask=mine, other=0.0).to(tl.float32)
    row = token
    wanted = token < tl.load(place + TOKENS)
    if COMPACT:
        row = tl.load(rows + server * tokens + token, mask=token < tokens, other=-1)
        wanted = row >= 0
    ids_there = tl.load(place + IDS).to(tl.pointer_type(tl.int32))
    weights_there = tl.load(place + WEIGHTS).to(tl.pointer_type(tl.float32))
    tl.store(ids_there + row * top_k + lane, tl.where(mine, expert, -1), mask=wanted & (lane < top_k))
    tl.store(weights_there + row * top_k + lane, weight, mask=wanted & (lane < top_k))
    pairs = tl.sum(tl.sum(mine.to(tl.int32), axis=1))
    if pairs > 0:
        tl.atomic_add(sent + 2 * server, tl.sum(tl.sum(tl.where(mine, _receipt_term(expert), 0), axis=1)))
        tl.atomic_add(sent + 2 * server + 1, pairs.to(tl.int64))
    strays = tl.sum(tl.sum(stray.to(tl.int32), axis=1))
    if (strays > 0) & (server == 0):
        tl.atomic_add(sent + 2 * S, strays.to(tl.int64))


@triton.jit(do_not_specialize=["tokens", "layer", "size_class", "groups"])
def dispatch(
    hidden,
    ids,
    weights,
    owners,
    places,
    rows,
    chosen,
    sent,
    tokens,
    groups,
    layer,
    size_class,
    top_k,
    E,
    H: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    BLOCKS: tl.constexpr,
    FP8: tl.constexpr,
    COMPACT: tl.constexpr,
):
    """Give each server hidden states [T, H], ids and weights [T, k] of the tokens that want it.

    `owners` [layers, E] int32: the server that has an expert, -1 for none. `sent` [2 S + 1] int64 gets, added, of each
    server the receipt that it owes and its pairs, and at last the pairs that nobody takes. Without COMPACT every server
    gets all tokens, padded to `size_class`. Grid (groups + rows, S), with groups of GROUP rows: T of them with COMPACT,
    and those of the class without.
    """
    program, server = tl.program_id(0), tl.program_id(1)
    if COMPACT:
        size_class = tl.load(chosen + server)
    place = _place(places, server, size_class, C)
    owners += layer * E
    if program < groups:
        first = program * GROUP
        _route(ids, weights, owners, place, rows, sent, first, tokens, server, top_k, E, S, K, COMPACT)
    else:
        token = program - groups
        _, mine, _ = _mine(ids, owners, token, tokens, server, top_k, E, K)
        if tl.sum(mine.to(tl.int32)) > 0:
            row = token
            if COMPACT:
                row = tl.load(rows + server * tokens + token)
            if FP8:
                _quantize(hidden, place, token, row, H, BLOCKS)
            else:
                _copy(hidden, place, token, row, H, BLOCKS)
        elif FP8 and not COMPACT:
            _clear_scales(place, token, H, BLOCKS)


@triton.jit
def _tell(base, verdict, slot, SIMULATED: tl.constexpr):
    """Leave word of a failure, unless there is some."""
    if (verdict > 0) & (tl.load(_word(base + TOLD), volatile=True) == 0):
        tl.store((base + TOLD_SLOT).to(tl.pointer_type(tl.int64)), slot)
        _fence(SIMULATED)
        tl.store(_word(base + TOLD), verdict)


@triton.jit
def _post(base, slot, tail, entries):
    """Without what makes it known."""
    tl.store(_word(base + slot), POSTED)
    entry = base + RING + (tail & (entries - 1)) * ENTRY_BYTES
    tl.store(entry.to(tl.pointer_type(tl.int64)), slot)
    tl.store(_word(entry + 8), REQUEST)
    tl.store(_word(entry + 12), 0)


@triton.jit
def _slot(place, layer, slot_bytes, C: tl.constexpr):
    return tl.load(place + SLOTS) + layer.to(tl.int64) * C * slot_bytes


@triton.jit(do_not_specialize=["layer", "size_class"])
def post(
    places,
    tails,
    chosen,
    sent,
    verdicts,
    layer,
    size_class,
    slot_bytes,
    S: tl.constexpr,
    C: tl.constexpr,
    COMPACT: tl.constexpr,
    SIMULATED: tl.constexpr,
):
    """Post what was dispatched; the servers without pairs are not asked, and as if they had answered.

    `tails` [S] int32: entries posted so far. `verdicts` [S + 1] int32: NOT_ASKED or 0, and whether there are pairs that
    nobody takes. Grid (S,).
    """
    server = tl.program_id(0)
    if COMPACT:
        size_class = tl.load(chosen + server)
    place = _place(places, server, size_class, C)
    base = tl.load(place + BASE)
    if server == 0:
        strays = tl.load(sent + 2 * S)
        tl.store(sent + 2 * S, 0)
        strayed = tl.where(strays > 0, NOBODY_OWNS, 0)
        tl.store(verdicts + S, strayed)
        _tell(base, strayed, layer.to(tl.int64), SIMULATED)
    if tl.load(sent + 2 * server + 1) == 0:
        tl.store(verdicts + server, NOT_ASKED)
        if base != 0:
            tl.store(_word(base + ANSWERED), 1)
    else:
        tl.store(verdicts + server, 0)
        if tl.load(_word(base + OVER), volatile=True) == 0:
            tl.store(_word(base + ANSWERED), 0)
        tail = tl.load(tails + server)
        tl.store(tails + server, tail + 1)
        _post(base, _slot(place, layer, slot_bytes, C), tail, tl.load(place + ENTRIES).to(tl.int32))
        _fence(SIMULATED)
        tl.store(_word(base + TAIL), tail + 1)


@triton.jit(do_not_specialize=["layer", "size_class"])
def settle(
    places,
    tails,
    chosen,
    sent,
    verdicts,
    layer,
    size_class,
    slot_bytes,
    C: tl.constexpr,
    COMPACT: tl.constexpr,
    SIMULATED: tl.constexpr,
):
    """Wait until what was posted is answered or the host says that it will not be; `verdicts` say which.

    `sent` is taken, and 0 again. Grid (S,).
    """
    server = tl.program_id(0)
    owed = tl.load(sent + 2 * server)
    tl.store(sent + 2 * server, 0)
    tl.store(sent + 2 * server + 1, 0)
    if COMPACT:
        size_class = tl.load(chosen + server)
    place = _place(places, server, size_class, C)
    if tl.load(verdicts + server) != NOT_ASKED:
        base, slot = tl.load(place + BASE), _slot(place, layer, slot_bytes, C)
        state = tl.load(_word(base + slot), volatile=True)
        over = tl.load(_word(base + OVER), volatile=True)
        while (state != DONE) & (over == 0):
            state = tl.load(_word(base + slot), volatile=True)
            over = tl.load(_word(base + OVER), volatile=True)
        _fence(SIMULATED)
        verdict = tl.load(_word(base + slot + CODE), volatile=True)
        receipt = tl.load((base + slot + RECEIPT).to(tl.pointer_type(tl.uint32)), volatile=True)
        differs = receipt.to(tl.int64) != (owed & 0xFFFFFFFF)
        verdict = tl.where((verdict == 0) & differs, RECEIPT_DIFFERS, verdict)
        verdict = tl.where(state == DONE, verdict, NOBODY_ANSWERS)
        tl.store(verdicts + server, verdict)
        _tell(base, verdict, slot, SIMULATED)
        tl.store(_word(base + ENDED), tl.load(tails + server))


@triton.jit(do_not_specialize=["tokens", "size_class"])
def combine(
    out,
    places,
    rows,
    chosen,
    verdicts,
    tokens,
    size_class,
    H: tl.constexpr,
    S: tl.constexpr,
    C: tl.constexpr,
    COLUMNS: tl.constexpr,
    FP32: tl.constexpr,
    COMPACT: tl.constexpr,
):
    """`out` [T, H]: the servers' partial sums, added in FP32 in their order; NaN unless all have answered.

    Grid (T, H in COLUMNS).
    """
    token = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    failed = tl.load(verdicts + S) != 0
    for server in range(S):
        verdict = tl.load(verdicts + server)
        failed |= verdict > 0
        row = token
        its_class = size_class
        if COMPACT:
            its_class = tl.load(chosen + server)
            row = tl.load(rows + server * tokens + token)
        if (verdict == 0) & (row >= 0):
            address = tl.load(_place(places, server, its_class, C) + PARTIALS)
            at = row.to(tl.int64) * H + column
            if FP32:
                total += tl.load(address.to(tl.pointer_type(tl.float32)) + at, mask=column < H, other=0.0)
            else:
                part = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + at, mask=column < H, other=0.0)
                total += part.to(tl.float32)
    total = tl.where(failed, float("nan"), total)
    tl.store(out + token.to(tl.int64) * H + column, total.to(out.dtype.element_ty), mask=column < H)
