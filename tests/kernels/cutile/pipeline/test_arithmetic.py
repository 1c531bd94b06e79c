"""What the served layers launch, seen without a GPU."""

from unittest.mock import patch

import pytest
import torch

from expertd.kernels.cutile.base.launch import Gpu, Launch
from expertd.kernels.cutile.pipeline.arithmetic import FastLayer
from expertd.kernels.cutile.pipeline.table import Table
from expertd.kernels.cutile.tools.inputs import random_batch, random_weights
from expertd.kernels.cutile.tools.registry import META, V3


@pytest.mark.parametrize("tokens", [1, 8, 64, 1024])
def test_a_batch_is_read_once_in_a_kernel_that_gathers_its_rows(tokens: int) -> None:
    weights, batch = random_weights(V3, META), random_batch(V3, tokens, META)
    layer = FastLayer(weights, Table({}), Gpu("sm_90", 132), META, max_tokens=1024, max_top_k=8, batch_invariant=False)
    sums, pairs = torch.empty(tokens, V3.hidden_size, device=META), torch.empty(32, dtype=torch.int32, device=META)
    launched: list[Launch] = []
    with patch.object(Launch, "__call__", lambda launch: launched.append(launch)):
        layer.compute(weights, batch, sums, pairs)
    readers = [launch.name for launch in launched if launch.name in ("gather_rows", "gemm1_one_token")]
    assert readers == ["gather_rows"]
