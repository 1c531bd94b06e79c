"""Which weights calls use while servers have two generations: of what servers tell, and nothing else."""

from collections.abc import Mapping
from dataclasses import asdict

import pytest

from expertd.client.fleet.models import Called, choose_generation, choose_model
from expertd.kernels.model.config import MoeConfig
from expertd.proto.codec import GenerationInfo, ShardInfo

Told = tuple[str, ShardInfo]
LOW, HIGH = range(8), range(8, 16)
ALL = range(16)


def server(experts: range, serving: str, following: Mapping[str, float] | None = None) -> Told:
    """One that has the weights `serving`, and those `following`, with their share."""
    (name, share), *_ = [*(following or {"": 0.0}).items()]
    shard = ShardInfo(
        model_fingerprint=serving,
        placement_epoch=1,
        config=asdict(MoeConfig(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4)),
        experts={1: tuple(experts)},
        max_tokens_per_request=1,
        max_message_bytes=1,
        max_queued_tokens=1,
        max_queued_bytes=1,
        backend="torch",
        device="",
        backend_reason="",
        version="",
        locality="",
        next=GenerationInfo(name, share=share) if name else None,
    )
    return f"{experts.start}-{serving}-{name}", shard


BOTH = {
    "staged on one alone": ([server(LOW, "a", {"b": 0}), server(HIGH, "a")], Called("a")),
    "staged": ([server(LOW, "a", {"b": 0}), server(HIGH, "a", {"b": 0})], Called("a")),
    "switched on one alone": ([server(LOW, "a", {"b": 1}), server(HIGH, "a", {"b": 0})], Called("a")),
    "a share": ([server(LOW, "a", {"b": 0.5}), server(HIGH, "a", {"b": 0.1})], Called("a", "b", 0.1)),
    "switched": ([server(LOW, "a", {"b": 1}), server(HIGH, "a", {"b": 1})], Called("b")),
    "released on one": ([server(LOW, "b"), server(HIGH, "a", {"b": 1})], Called("b")),
    "back on one": ([server(LOW, "a", {"b": 0}), server(HIGH, "a", {"b": 1})], Called("a")),
    "one began anew": ([server(LOW, "a"), server(HIGH, "a", {"b": 1})], Called("a")),
    "a copy began anew": ([server(ALL, "a"), server(LOW, "a", {"b": 1}), server(HIGH, "a", {"b": 1})], Called("b")),
    "another copy has the next one alone": ([server(ALL, "b"), server(ALL, "a", {"b": 0})], Called("a")),
}


@pytest.mark.parametrize("before", ["a", "b"], ids=["before", "after"])
@pytest.mark.parametrize(("servers", "called"), BOTH.values(), ids=BOTH)
def test_all_who_see_the_same_call_the_same(servers: list[Told], called: Called, before: str) -> None:
    assert choose_generation(servers, before) == called
    assert choose_generation(servers, choose_model(servers, None)) == called
    assert choose_generation(list(reversed(servers)), before) == called


def test_when_nobody_has_the_former_one_the_only_whole_one_is_called() -> None:
    assert choose_generation([server(LOW, "b"), server(HIGH, "b")], "a") == Called("b")
    assert choose_generation([server(LOW, "b"), server(HIGH, "a")], "a") == Called("a")
    assert choose_generation([server(ALL, "b"), server(ALL, "c")], "a") == Called("a")
