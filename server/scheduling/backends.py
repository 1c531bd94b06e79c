"""Which compute backend serves, and why."""

from __future__ import annotations

import importlib.util

import torch

from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics.backend import Backend, UnsupportedShape
from expertd.kernels.torch.backend import TorchBackend
from expertd.server.options.config import InvalidOption, ServerConfig


def choose_backend(config: ServerConfig, model: MoeConfig) -> tuple[Backend, str]:
    """The backend that `--backend` asks for with the reason for it. Raises `InvalidOption` when it cannot run here."""
    wanted, obstacle = config.backend, _cutile_obstacle()
    if wanted == "torch":
        return TorchBackend(), "--backend torch"
    if wanted == "cutile" and obstacle is not None:
        raise InvalidOption(f"--backend cutile cannot run here: {obstacle}")
    if obstacle is not None:
        return TorchBackend(), f"--backend auto: {obstacle}"
    from expertd.kernels.cutile.run.backend import CutileBackend

    try:
        backend = CutileBackend(
            config.pipeline,
            batch_invariant=config.batch_invariant,
            max_batch_tokens=config.max_batch_tokens,
            max_top_k=model.num_experts_per_tok,
        )
    except UnsupportedShape as error:
        raise InvalidOption(f"--pipeline {config.pipeline} cannot run here: {error}") from None
    return backend, "--backend cutile" if wanted == "cutile" else f"--backend auto: found {backend.device}"


def _cutile_obstacle() -> str | None:
    """Why cuTile kernels cannot run on this machine; None when they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.tile") is None:
        return "the package cuda-tile is not installed (pip install 'expertd[server]')"
    return None
