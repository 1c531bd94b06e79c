"""What the routing kernel refuses; its results are tested on a GPU."""

import pytest
import torch

from expertd.kernels.cutile.routing.top_k import route
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics.backend import UnsupportedShape


def test_softmax_scores_are_refused_by_family_with_the_remedy() -> None:
    config = MoeConfig(model_type="mixtral", n_routed_experts=8, n_group=1, topk_group=1, num_experts_per_tok=2)
    ids, weights = torch.empty(3, 2, dtype=torch.int32), torch.empty(3, 2)
    with pytest.raises(
        UnsupportedShape, match=r"mixtral scores by softmax, .*; use expertd\.kernels\.numerics\.routing\.route"
    ):
        route(torch.zeros(3, 8), torch.zeros(8), ids, weights, config)
