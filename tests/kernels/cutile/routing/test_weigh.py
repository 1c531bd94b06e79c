"""What the kernel that weighs experts of others' choice writes, by its source."""

import pytest
import torch

from expertd.kernels.cutile.routing.weigh import weigh
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics.routing import weigh as torch_weigh
from tests.support.kernels.routings import ROUTINGS, chosen_by_token, outputs, random_logits
from tests.support.kernels.tiles import run


@pytest.mark.parametrize("config", ROUTINGS.values(), ids=ROUTINGS)
def test_weights_are_those_of_the_definition(config: MoeConfig) -> None:
    logits, _ = random_logits(config, 30)
    ids = chosen_by_token(config, 30)
    _, weights = outputs(30, config)
    run(weigh(logits, ids, weights, config))
    torch.testing.assert_close(weights, torch_weigh(logits, ids, config), rtol=2e-6, atol=1e-30)


def test_an_expert_that_does_not_exist_weighs_nothing() -> None:
    config = ROUTINGS["DeepSeek-V4-Pro"]
    logits, _ = random_logits(config, 1)
    _, weights = outputs(1, config)
    run(weigh(logits, torch.tensor([[3, -1, 384, 4, 5, 6]], dtype=torch.int32), weights, config))
    assert [float(weight) > 0 for weight in weights[0]] == [True, False, False, True, True, True]
