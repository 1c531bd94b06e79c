"""What a placement does to traffic: balance, fan-out and bytes a token, for fleets up to thousands of servers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from expertd.client.placement.assignment import Fleet, InvalidPlan, Placement, place
from expertd.client.placement.packing import Integers
from expertd.kernels.model.config import MoeConfig
from expertd.kernels.numerics.routing import route

FLEETS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 5000, 10000)
"""Numbers of servers that are simulated."""


@dataclass(frozen=True, slots=True)
class Simulation:
    """One fleet under one policy."""

    servers: int
    policy: str
    balancedness: float
    """Of tokens other than those the placement was made from."""
    fan_out: float
    """Servers that a token is sent to, on average."""
    bytes_per_token: float
    """Sent and received: FP8 activations with scales, ids and weights; BF16 partial sums."""


def simulate(config: MoeConfig, slots: int, zipf: float, tokens: int = 4096) -> Iterator[Simulation]:
    """Place for every fleet of `FLEETS` with room for all experts, by groups and without, and route other tokens.

    Every server has `slots` slots and is a node of its own. Experts of a group are chosen with chances that fall
    as 1 / rank^`zipf`; which expert has which rank is random with a fixed seed.
    """
    generator = torch.Generator().manual_seed(0)
    ranks = torch.randperm(config.n_routed_experts, generator=generator) + 1
    seen, fresh = (_routed(config, ranks.float(), zipf, tokens, generator) for _ in range(2))
    heat = np.bincount(seen.ravel(), minlength=config.n_routed_experts)[None].astype(np.float64)
    fresh_heat = np.bincount(fresh.ravel(), minlength=config.n_routed_experts)[None].astype(np.float64)
    for servers in FLEETS:
        if servers * slots < config.n_routed_experts:
            continue
        for groups in (config.n_group, 1):
            placement = place(heat, Fleet.uniform(servers, slots, servers), groups)
            if groups > 1 and placement.policy == "global":
                continue
            servers_per_token = fan_out(placement, fresh)
            yield Simulation(
                servers=servers,
                policy=placement.policy,
                balancedness=placement.balancedness(fresh_heat),
                fan_out=servers_per_token,
                bytes_per_token=servers_per_token * bytes_per_visit(config),
            )


def fan_out(placement: Placement, expert_ids: Integers) -> float:
    """Mean number of distinct servers over tokens [T, k], when a caller takes one random share of all copies.

    A caller draws u from [0, 1) and sends expert e, with c copies, to the floor(u * c)-th of its servers in order: all
    copies get equal heat, and experts with the same servers go to the same one.
    """
    copies = placement.copies()
    first = np.concatenate(([0], copies.cumsum()[:-1]))
    holders = np.nonzero(placement.held.T)[1]
    share = np.random.default_rng(0).random((len(expert_ids), 1))
    servers = np.sort(holders[first[expert_ids] + (share * copies[expert_ids]).astype(np.int64)], axis=1)
    return float(1 + (np.diff(servers, axis=1) > 0).sum(axis=1).mean())


def bytes_per_visit(config: MoeConfig) -> int:
    """Bytes of one token to one server and back."""
    sent = config.hidden_size + config.hidden_size // 128 * 4 + config.num_experts_per_tok * (4 + 4)
    return sent + config.hidden_size * 2


def plot(simulations: list[Simulation], file: Path) -> None:
    """Draw balancedness, fan-out and bytes over the number of servers; needs the extra `plot`."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InvalidPlan("--plot needs matplotlib, which is not installed; pip install 'expertd[plot]'") from None
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    panels = (
        ("balancedness", "balancedness (mean / max)", 1.0),
        ("fan_out", "servers a token", 1.0),
        ("bytes_per_token", "KB a token", 1e-3),
    )
    for axes, (field, label, unit) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for policy in sorted({simulation.policy for simulation in simulations}):
            mine = [simulation for simulation in simulations if simulation.policy == policy]
            axes.plot([one.servers for one in mine], [getattr(one, field) * unit for one in mine], "o-", label=policy)
        axes.set(xscale="log", xlabel="servers", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    figure.savefig(file, dpi=120)


def _routed(config: MoeConfig, ranks: torch.Tensor, zipf: float, tokens: int, generator: torch.Generator) -> Integers:
    """[T, k] expert ids of random tokens: a sigmoid of Gumbel noise over log popularity."""
    noise = -torch.log(
        -torch.log(torch.rand(tokens, config.n_routed_experts, generator=generator, dtype=torch.float32))
    )
    logits = noise - zipf * ranks.log()
    ids, _ = route(logits, torch.zeros(config.n_routed_experts, dtype=torch.float32), config)
    return ids.numpy().astype(np.int64)
