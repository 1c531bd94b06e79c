"""The engine's rules against the Python ones: equal verdicts in equal words, for good, bad and mutated requests."""

import random
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from expertd._native import CallbackExecutor, Engine, Inbox, Tally
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics.backend import TokenBatch
from expertd.proto import codec
from expertd.proto.base.errors import ExpertdError
from expertd.proto.codec import ExecuteCall, wire
from expertd.server.scheduling.shard import Shard
from tests.support.model.messages import decode_call
from tests.support.model.requests import parse_request
from tests.support.model.rules import admit

EXECUTOR = CallbackExecutor(1 << 20)
CONFIG = MoeConfig(
    hidden_size=256,
    moe_intermediate_size=128,
    n_routed_experts=16,
    num_experts_per_tok=4,
    n_group=1,
    topk_group=1,
    num_hidden_layers=9,
)
MAX_TOKENS = 8
SHARD = Shard(
    CONFIG,
    "a'fingerprint\\of\x7f 64 or more bytes, of which an error quotes no more than 64.",
    12,
    {3: (0, 1, 7, 12, 13), 5: (1, 7), 6: (0, 2, 15)},
)
ROUNDS = 100_000
NUMBERS = (b"\0", b"\1", b"\xff" * 9 + b"\1", b"\xff" * 9 + b"\2", b"\x80" * 10 + b"\1", b"\x80")


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = Engine(
        SHARD.placement(MAX_TOKENS),
        max_batch_tokens=1,
        max_queued_tokens=1 << 40,
        max_queued_bytes=1 << 40,
        tally=Tally(SHARD.layers, CONFIG.n_routed_experts, (1.0,), (1.0,)),
    )
    engine.use(EXECUTOR)
    engine.open()
    return engine


def by_python(data: bytes) -> TokenBatch | ExpertdError:
    try:
        raw = parse_request(data)
        call = decode_call(raw, CONFIG.hidden_size, CONFIG.num_experts_per_tok, MAX_TOKENS, None)
        return admit(SHARD, call)
    except ExpertdError as error:
        return error


def check(engine: Engine, data: bytes) -> str:
    """Compare both; what the verdict was."""
    inbox = Inbox()
    got = inbox.submit(engine, data, "caller", None, None, "")
    expected = by_python(data)
    if isinstance(expected, ExpertdError):
        assert got.refusal is not None
        assert (got.refusal.code, got.refusal.text) == (expected.code.value[0], str(expected))
        return str(expected).split(" is ")[0]
    assert got.refusal is None
    engine.turn(0)
    while engine.handed_out:
        time.sleep(0.0001)
    engine.turn(0)
    if not (expected.expert_ids >= 0).any():
        # No executor gets what wants no expert.
        (answer,) = inbox.drain()
        assert answer.response is not None
        assert codec.parse_response(answer.response).error is None
        return "admitted"
    batch = EXECUTOR.fetch()
    assert batch is not None
    ((hidden, scales, ids, weights, _, tokens),) = batch.requests()
    assert tokens == expected.num_tokens
    assert bytes(hidden) == codec.flat_bytes(expected.hidden).numpy().tobytes()
    assert (scales is None) == (expected.scales is None)
    if expected.scales is not None:
        assert scales is not None
        assert bytes(scales) == expected.scales.numpy().tobytes()
    assert bytes(ids) == expected.expert_ids.numpy().tobytes()
    assert bytes(weights) == expected.weights.numpy().tobytes()
    batch.fail("not computed here")
    engine.turn(0)
    inbox.drain()
    return "admitted"


def good_call(chance: random.Random) -> ExecuteCall:
    tokens, top_k = chance.randint(1, MAX_TOKENS), chance.randint(1, 4)
    generator = np.random.default_rng(chance.getrandbits(64))
    quantised = chance.random() < 0.6
    hidden = torch.from_numpy(generator.standard_normal((tokens, CONFIG.hidden_size), dtype=np.float32))
    layer = chance.choice(SHARD.layers)
    owned = np.array([*SHARD.experts[layer], -1, -1, -1, -1])
    ids = np.stack([generator.permutation(owned)[:top_k] for _ in range(tokens)]).astype(np.int32)
    return ExecuteCall(
        request_id=chance.choice((0, 1, 127, 128, 2**64 - 1)),
        model_fingerprint=SHARD.model_fingerprint,
        placement_epoch=chance.choice((None, SHARD.placement_epoch)),
        layer=layer,
        hidden=hidden.to(torch.float8_e4m3fn if quantised else torch.bfloat16),
        scales=torch.rand(tokens, CONFIG.hidden_size // 128) if quantised else None,
        expert_ids=torch.from_numpy(ids),
        weights=torch.rand(tokens, top_k),
        reply_dtype=chance.choice(codec.REPLY_DTYPES),
        timeout=chance.choice((None, 0.5)),
        traceparent=chance.choice(("", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")),
    )


def spoil(call: ExecuteCall, chance: random.Random) -> ExecuteCall:
    """One thing of a call that is wrong, or at a bound."""
    row, column = chance.randrange(call.expert_ids.shape[0]), chance.randrange(call.expert_ids.shape[1])
    odd = torch.tensor(chance.choice((float("nan"), float("inf"), float("-inf"), -float("nan"), 3e38)))
    ids, weights = call.expert_ids.clone(), call.weights.clone()
    match chance.randrange(8):
        case 0:
            name = chance.choice(("", "other", "é" * 80, "\0\n\\'" * 20, SHARD.model_fingerprint + "x"))
            return replace(call, model_fingerprint=name)
        case 1:
            return replace(call, placement_epoch=chance.choice((0, 11, 2**64 - 1)))
        case 2:
            return replace(call, layer=chance.choice((0, 4, 7, 2**32 + 3, 2**64 - 1)))
        case 3:
            ids[row, column] = chance.choice((-2, 16, 2**31 - 1, -(2**31), 2, 15, 7, -1))
        case 4:
            ids[row] = ids[row, column]
        case 5:
            weights[row, column] = odd
        case 6 if call.scales is not None:
            scales = call.scales.clone()
            scales[row, chance.randrange(2)] = odd
            return replace(call, scales=scales)
        case _:
            rows = chance.randint(0, 9)
            hidden = call.hidden[:1].view(torch.uint8).repeat(rows, 1).view(call.hidden.dtype)
            return replace(call, hidden=hidden)
    return replace(call, expert_ids=ids, weights=weights)


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Other bytes: changed, cut out, put in, repeated, or with a field more."""
    out = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(min(len(out), chance.choice((24, 200, 1 << 20)))) if out else 0
        match chance.randrange(6):
            case 0:
                out[at : at + 1] = bytes([chance.getrandbits(8)])
            case 1:
                del out[at : at + chance.choice((1, 4, 300))]
            case 2:
                out[at:at] = chance.randbytes(chance.choice((1, 4, 11)))
            case 3:
                out += wire.varint(chance.randrange(1, 21) << 3) + chance.choice(NUMBERS)
            case 4:
                out += wire.varint(chance.randrange(1, 21) << 3 | chance.choice((1, 2, 3, 5))) + b"\3abc"
            case 5:
                out += (wire.varint(15 << 3 | 2) + b"\0") * chance.choice((1, 63, 64))
    return bytes(out)


@pytest.mark.parametrize("seed", range(4))
def test_verdicts_and_words_are_those_of_the_python_rules(engine: Engine, seed: int) -> None:
    chance = random.Random(seed)
    verdicts = set()
    for _ in range(ROUNDS // 4):
        call = good_call(chance)
        if chance.random() < 0.5:
            call = spoil(call, chance)
        data = codec.encode_call(call, checked=chance.random() < 0.5)
        if chance.random() < 0.5:
            data = mutate(data, chance)
        verdicts.add(check(engine, data))
    # Every rule had its turn.
    assert {
        "admitted", "cancels", "num_tokens", "top_k", "hidden_dtype", "reply_dtype", "model_fingerprint",
        "placement_epoch", "layer", "segment_offset", "gpu_offset", "sums_offset", "fields_checksum",
        "tensors_checksum",
    } <= verdicts  # fmt: skip
    for end in ("", "the request was altered on its way"):
        assert {verdict for verdict in verdicts if verdict.startswith("the ") and verdict.endswith(end)}
    for field in ("hidden_scales", "weights", "expert_ids"):
        assert any(verdict.startswith(f"{field}[") for verdict in verdicts)
    for field in ("hidden", "hidden_scales", "weights", "expert_ids"):
        assert any(verdict.startswith(f"{field} has ") for verdict in verdicts)
