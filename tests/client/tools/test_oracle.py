"""What `expertd demo --model` compares with: transformers' block of the family, with a layer's weights."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig

from expertd.client.tools.oracle import load_oracle
from expertd.kernels.model.config import InvalidConfig
from expertd.kernels.weights.checkpoint import Checkpoint
from tests.support.families import CONFIGS, SERVED, auto_model, layers_of, routed, write_family

BY_TOKEN_ID = ("deepseek_ref", "deepseek_v4")
COMPARED = sorted((CONFIGS | SERVED).keys() - set(BY_TOKEN_ID))


@pytest.mark.parametrize("model_type", COMPARED)
def test_it_is_the_models_own_block(model_type: str, tmp_path: Path) -> None:
    folders = write_family(tmp_path, model_type)
    auto = auto_model(AutoConfig.from_pretrained(folders.floats))
    model = auto.from_pretrained(folders.floats, dtype=torch.float32, experts_implementation="eager").eval()
    hidden = torch.randn(50, 256, generator=torch.Generator().manual_seed(3))
    with Checkpoint(folders.quantized) as checkpoint, torch.inference_mode():
        layer = checkpoint.config.moe_layers[-1]
        oracle, block = load_oracle(checkpoint, layer), layers_of(model)[layer].mlp
        assert torch.equal(oracle.layer(hidden), block(hidden.unsqueeze(0))[0])
        experts, ids, _ = routed(block, hidden, hidden)
        assert torch.equal(oracle.route(hidden), ids)
        torch.testing.assert_close(oracle.layer(hidden) - oracle.shared(hidden), experts, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", BY_TOKEN_ID)
def test_others_are_refused_with_what_compares_them(model_type: str, tmp_path: Path) -> None:
    folder = write_family(tmp_path, model_type).quantized
    with Checkpoint(folder) as checkpoint, pytest.raises(InvalidConfig, match=r"by token id, .* use 'expertd verify'"):
        load_oracle(checkpoint, checkpoint.config.moe_layers[0])
