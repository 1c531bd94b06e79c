"""Calls with checksums: the same bits as without, and what was altered is computed again elsewhere."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.transport.security import ClientSecurity
from expertd.client.transport.shared_memory import SharedMemoryTransport
from expertd.proto.base.errors import ServerFault, Unavailable
from expertd.server.failpoints import VARIABLE
from tests.support.certificates import Authority
from tests.support.coordinators import LAYER, QUICK, routing, tokens
from tests.support.fleets import addresses
from tests.support.serving import running_server

ALL = range(16)
ALWAYS = CoordinatorConfig(checksums="always")
FP8_REPLIES = CoordinatorConfig(reply_dtype=torch.float8_e4m3fn)
LONG = 4200
"""Tokens of a call whose checksums a thread of the pool takes: those of a megabyte of hidden states or sums."""


@pytest.mark.parametrize("count", [1, 300, LONG])
@pytest.mark.parametrize("config", [CoordinatorConfig(), QUICK, FP8_REPLIES], ids=["float8", "exact", "fp8-replies"])
async def test_results_are_those_without_checksums(small_model: Path, config: CoordinatorConfig, count: int) -> None:
    ids, weights = routing(count)
    async with running_server(small_model, ALL, max_tokens_per_request=LONG) as server:
        outputs = []
        for one in (config, replace(config, checksums="always")):
            async with Coordinator(addresses([server]), one) as moe:
                assert moe.sharing_memory
                calls = (moe(LAYER, tokens(count), topk_ids=ids, topk_weights=weights) for _ in range(3))
                outputs += await asyncio.gather(*calls)
    assert all(torch.equal(output, outputs[0]) for output in outputs)


@pytest.mark.parametrize("count", [20, LONG])
@pytest.mark.parametrize("fault", ["corrupt_request", "corrupt_reply"])
@pytest.mark.parametrize("share", [1 << 25, 0], ids=["lane", "grpc"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
async def test_what_one_replica_gets_or_says_altered_is_computed_by_another(
    small_model: Path, monkeypatch: pytest.MonkeyPatch, fault: str, share: int, count: int, dtype: torch.dtype
) -> None:
    config = replace(ALWAYS, shared_memory_bytes=share, reply_dtype=dtype)
    ids, weights = routing(count)
    monkeypatch.setenv(VARIABLE, f"{fault}=1")
    async with running_server(small_model, ALL, max_tokens_per_request=LONG) as faulty:
        async with Coordinator(addresses([faulty]), config) as moe:
            with pytest.raises((ServerFault, Unavailable), match="altered on its way"):
                await moe(LAYER, tokens(count), topk_ids=ids, topk_weights=weights)
        monkeypatch.delenv(VARIABLE)
        async with (
            running_server(small_model, ALL, max_tokens_per_request=LONG) as sound,
            Coordinator(addresses([sound]), config) as alone,
            Coordinator(addresses([faulty, sound]), config) as moe,
        ):
            right = await alone(LAYER, tokens(count), topk_ids=ids, topk_weights=weights)
            for _ in range(4):
                output = await moe(LAYER, tokens(count), topk_ids=ids, topk_weights=weights)
                assert torch.equal(output, right)


@pytest.mark.parametrize(
    ("checksums", "encrypted", "address", "over_grpc", "shared"),
    [
        ("plain", False, "host:1", True, False),
        ("plain", True, "unix:/path", True, False),
        ("plain", True, "host:1", False, False),
        ("always", True, "host:1", True, True),
        ("always", False, "host:1", True, True),
    ],
)
async def test_which_requests_have_them(
    tmp_path: Path, checksums: Literal["plain", "always"], encrypted: bool, address: str, over_grpc: bool, shared: bool
) -> None:
    security = ClientSecurity(root_ca=Authority(tmp_path).pem) if encrypted else None
    transport = Coordinator([address], CoordinatorConfig(checksums=checksums, security=security))._transport(address)
    assert isinstance(transport, SharedMemoryTransport)
    assert (transport.grpc.checked, transport._checked) == (over_grpc, shared)
    await transport.close()


def test_others_are_refused() -> None:
    wrong: Any = "never"
    with pytest.raises(ValueError, match="checksums is 'never'; choose from plain, always"):
        CoordinatorConfig(checksums=wrong)
