"""Tensors that native code takes as they are: what they must be, and what is said of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from expertd import _native
from expertd.client.transport import native_call
from expertd.client.transport.native_call import OneOwner, Terms
from expertd.kernels.numerics.quantize import FP8
from tests.support.model.requests import parse_request
from tests.support.serving import call_of, random_batch

TOKENS, WIDTH, TOP_K = 3, 256, 2
TERMS = Terms(1, FP8, torch.bfloat16, 1, None)


def tensors() -> dict[str, Any]:
    return {
        "hidden": torch.randn(TOKENS, WIDTH).to(FP8),
        "ids": torch.tensor([[0, 1], [2, -1], [-1, -1]], dtype=torch.int32),
        "weights": torch.rand(TOKENS, TOP_K),
        "terms": TERMS,
        "scales": torch.ones(TOKENS, WIDTH // 128),
        "chosen": torch.zeros(1, 4, dtype=torch.int64),
    }


def begin(**changes: object) -> _native.StraightCall | None:
    """By messages, to one owner of four experts."""
    owner = _native.Owner(0, [], "f" * 32, 3, TOKENS, 0, False)
    return _native.StraightCall.begin([owner], **(tensors() | changes))


def strided(values: Tensor) -> Tensor:
    """The same with other values between its rows."""
    return torch.cat((values, values), dim=1)[:, : values.shape[1]]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"hidden": torch.zeros(WIDTH, TOKENS).t()}, r"hidden: torch\.float32 \[3, 256\], strides \(1, 3\), on cpu"),
        ({"hidden": torch.zeros(WIDTH)}, "it must be a matrix of whole rows on the CPU"),
        (
            {"hidden": torch.zeros(TOKENS, WIDTH, device="meta")},
            "on meta; it must be a matrix of whole rows on the CPU",
        ),
        ({"hidden": torch.zeros(TOKENS, WIDTH).double(), "scales": None}, "hidden is neither bfloat16 nor float16 nor"),
        ({"ids": torch.zeros(TOKENS, TOP_K)}, r"ids: torch\.float32 .* it must be contiguous int32 \[3, any\]"),
        ({"ids": torch.zeros(2, TOP_K, dtype=torch.int32)}, r"ids: .* it must be contiguous int32 \[3, any\]"),
        ({"ids": strided(torch.zeros(TOKENS, TOP_K, dtype=torch.int32))}, "ids: .* it must be contiguous"),
        ({"weights": torch.rand(TOKENS, TOP_K).double()}, r"weights: .* it must be contiguous float32 \[3, 2\]"),
        ({"weights": torch.rand(TOKENS, 1)}, r"weights: torch\.float32 \[3, 1\]"),
        ({"scales": torch.ones(TOKENS, 3)}, r"scales: .* it must be float32 \[3, 2\] on the CPU"),
        ({"chosen": torch.zeros(1, 4, dtype=torch.int32)}, r"chosen: .* it must be contiguous int64 \[any, any\]"),
        ({"terms": TERMS._replace(reply_dtype=torch.int8)}, r"torch\.int8 does not travel"),
        ({"terms": TERMS._replace(hidden_dtype=torch.bfloat16)}, "hidden is not of the dtype that travels"),
        (
            {"terms": TERMS._replace(hidden_dtype=torch.float16), "scales": None, "hidden": torch.zeros(TOKENS, WIDTH)},
            "16 does not",
        ),
        ({"terms": TERMS._replace(traceparents=["a", "b"])}, "traceparents must be one for each owner, or none"),
    ],
)
def test_what_cannot_be_taken_is_refused_by_name(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        begin(**changes)


def test_rows_may_be_apart_and_ids_long() -> None:
    given = tensors()
    plain = begin(**given)
    apart = begin(
        **given | {name: strided(given[name]) for name in ("hidden", "scales")} | {"ids": given["ids"].long()}
    )
    assert plain is not None
    assert apart is not None
    ((_, _, _, one),), ((_, _, _, other),) = plain.messages, apart.messages
    assert one == other


def test_sums_have_a_place_of_their_shape() -> None:
    call = begin()
    assert call is not None
    for out, complaint in (
        (torch.zeros(2, WIDTH), r"out: it must be \[3, 256\]"),
        (torch.zeros(TOKENS, WIDTH, dtype=torch.int32), "out is neither"),
        (torch.zeros(TOKENS, WIDTH, device="meta"), "out: .* on meta"),
    ):
        with pytest.raises(ValueError, match=complaint):
            call.finish(0.0, out)


def fingerprint_sent(server: OneOwner, fingerprint: str) -> str:
    call = server.begin(call_of(random_batch(3, WIDTH, 4, TOP_K), model_fingerprint=fingerprint), checked=False)
    assert call is not None
    ((_, _, _, message),) = call.messages
    return bytes(parse_request(message).model_fingerprint).decode()


def test_a_server_that_another_thread_describes_anew_is_not_mixed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    server = OneOwner()

    def after_another(*said: Any) -> Terms:  # noqa: ANN401
        monkeypatch.undo()
        assert fingerprint_sent(server, "other") == "other"
        return Terms(*said)

    assert fingerprint_sent(server, "model") == "model"
    monkeypatch.setattr(native_call, "Terms", after_another)
    assert fingerprint_sent(server, "model") == "model"
