"""What the routing kernel chooses by its source; as compiled it is tested on a GPU."""

import pytest
import torch

from expertd.kernels.cutile.routing.top_k import route
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.model.families import FAMILIES
from expertd.kernels.numerics.routing import route as torch_route
from tests.support.kernels.routings import ROUTINGS, assert_routed, outputs, random_logits, tied
from tests.support.kernels.tiles import run

TOKENS = 300


def test_every_family_is_among_them() -> None:
    assert {config.model_type for config in ROUTINGS.values()} == FAMILIES.keys()


@pytest.mark.parametrize("config", ROUTINGS.values(), ids=ROUTINGS)
def test_it_chooses_as_the_definition_does(config: MoeConfig) -> None:
    logits, bias = random_logits(config, TOKENS)
    ids, weights = outputs(TOKENS, config)
    run(route(logits, bias, ids, weights, config))
    assert_routed(ids, weights, logits, bias, config)


@pytest.mark.parametrize("name", ["DeepSeek-V3", "DeepSeek-V4-Flash", "Qwen3-Next", "22 of 512"])
def test_ties_go_to_the_lower_expert_and_the_lower_group(name: str) -> None:
    config = ROUTINGS[name]
    logits, bias = tied(random_logits(config, TOKENS)[0]), torch.zeros(config.n_routed_experts)
    ids, weights = outputs(TOKENS, config)
    run(route(logits, bias, ids, weights, config))
    assert torch.equal(ids, torch_route(logits, bias, config)[0])
