"""Which compute backend serves, and why."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch

from expertd.kernels.model.config import MoeConfig
from expertd.kernels.model.loads import loads_of
from expertd.kernels.numerics.backend import Backend, UnsupportedShape
from expertd.kernels.torch.backend import TorchBackend
from expertd.server.options.config import ALL_DEVICES, InvalidOption, ServerConfig

Choose: TypeAlias = Callable[[ServerConfig, MoeConfig, int | None], tuple[Backend, str]]
"""The backend for a device, None for the usual one, and why it is that."""


def choose_backend(config: ServerConfig, model: MoeConfig, device: int | None = None) -> tuple[Backend, str]:
    """What `--backend` asks for. Raises `InvalidOption` when it cannot run here."""
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
            device="cuda" if device is None else f"cuda:{device}",
        )
    except UnsupportedShape as error:
        raise InvalidOption(f"--pipeline {config.pipeline} cannot run here: {error}") from None
    return backend, "--backend cutile" if wanted == "cutile" else f"--backend auto: found {backend.device}"


def choose_devices(
    config: ServerConfig, model: MoeConfig, choose: Choose = choose_backend
) -> tuple[dict[int, Backend], str]:
    """A backend for each of `--devices`, by number, and the reason for it. Raises `InvalidOption`."""
    if config.devices is None:
        backend, reason = choose(config, model, None)
        return {0: backend}, reason
    there = torch.cuda.device_count() if torch.cuda.is_available() and config.backend != "torch" else None
    numbers = tuple(range(there or 0)) if config.devices == ALL_DEVICES else config.devices
    if not numbers:
        raise InvalidOption("--devices all: there is no GPU to count; name as many as are to be simulated, such as 0-3")
    if there is not None and numbers[-1] >= there:
        raise InvalidOption(f"--devices names device {numbers[-1]}; torch sees {there}, from 0 on")
    chosen = {number: choose(config, model, number) for number in numbers}
    return {number: backend for number, (backend, _) in chosen.items()}, chosen[numbers[0]][1]


def read_loads(file: Path | None, model: MoeConfig) -> Mapping[int, Sequence[float]]:
    """What `--device-loads` has, of all experts by layer. Raises `InvalidOption`."""
    if file is None:
        return {}
    try:
        loads = loads_of(file, file.read_text())
    except (OSError, ValueError) as error:
        raise InvalidOption(f"--device-loads: {error}") from None
    count = len(next(iter(loads.values())))
    if count != model.n_routed_experts:
        raise InvalidOption(f"--device-loads: {file} has {count} experts; the model has {model.n_routed_experts}")
    return loads


def _cutile_obstacle() -> str | None:
    """Why cuTile kernels cannot run on this machine; None when they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.tile") is None:
        return "the package cuda-tile is not installed (pip install 'expertd[server]')"
    return None
