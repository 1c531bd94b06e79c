"""Checkpoints that many tests read."""

from pathlib import Path

import pytest
import torch

from expertd.client.tools.demo_checkpoint import DemoModel, write_demo_checkpoint
from tests.support.families import CONFIGS, FamilyFolders, write_family

# Threads that wait for each other by spinning take the processor from the servers under test.
torch.set_num_threads(1)

SMALL = DemoModel(
    hidden_size=256, moe_intermediate_size=128, n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2
)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 experts, top 4 of 2 of 4 groups, H 256, I 128, MoE layers 1 and 2, FP8."""
    return write_demo_checkpoint(tmp_path_factory.mktemp("models"), SMALL)


@pytest.fixture(scope="session", params=CONFIGS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> FamilyFolders:
    """A small model of each family beside DeepSeek-V3: 16 experts, H 256, I 128."""
    return write_family(tmp_path_factory.mktemp("family"), request.param)
