"""expertd: expert-parallel Mixture-of-Experts as a service.

What a caller needs is here. `SyncCoordinator` is the same without `await`, for scripts, threads and notebooks.

    from expertd import Coordinator

    async with Coordinator(["node0:50051", "node1:50051"]) as moe:
        y = await moe(layer, hidden, topk_ids=ids, topk_weights=weights)

Hugging Face models: `help("expertd.client.huggingface")`. The command line: `expertd --help`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from expertd.client.config import CoordinatorConfig
    from expertd.client.coordinator import Coordinator, MoeResult, ServerReport
    from expertd.client.discovery import DnsServers, FileServers
    from expertd.client.gate import Gate, load_gates
    from expertd.client.security import ClientSecurity
    from expertd.client.sync import SyncCoordinator
    from expertd.kernels.checkpoint import Checkpoint
    from expertd.proto.errors import (
        DeadlineExceeded,
        ExpertdError,
        InvalidBatch,
        ModelMismatch,
        Overloaded,
        ServerFault,
        StalePlacement,
        Unauthenticated,
        Unavailable,
        UnknownExpert,
    )

__version__ = "0.1.0"
__all__ = [
    "Checkpoint",
    "ClientSecurity",
    "Coordinator",
    "CoordinatorConfig",
    "DeadlineExceeded",
    "DnsServers",
    "ExpertdError",
    "FileServers",
    "Gate",
    "InvalidBatch",
    "ModelMismatch",
    "MoeResult",
    "Overloaded",
    "ServerFault",
    "ServerReport",
    "StalePlacement",
    "SyncCoordinator",
    "Unauthenticated",
    "Unavailable",
    "UnknownExpert",
    "load_gates",
]
_HOMES = {
    "Checkpoint": "kernels.checkpoint",
    "ClientSecurity": "client.security",
    "Coordinator": "client.coordinator",
    "CoordinatorConfig": "client.config",
    "DnsServers": "client.discovery",
    "FileServers": "client.discovery",
    "Gate": "client.gate",
    "MoeResult": "client.coordinator",
    "ServerReport": "client.coordinator",
    "SyncCoordinator": "client.sync",
    "load_gates": "client.gate",
}
"""Modules of the public names; the others are errors."""


def __getattr__(name: str) -> object:
    """A public name, imported when it is first used: torch takes seconds that `expertd --help` should not."""
    if name not in __all__:
        raise AttributeError(f"module 'expertd' has no attribute {name!r}; public names: {', '.join(__all__)}")
    module = importlib.import_module(f"expertd.{_HOMES.get(name, 'proto.errors')}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
