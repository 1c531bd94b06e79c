"""expertd: expert-parallel Mixture-of-Experts as a service.

What a caller needs is here. `SyncCoordinator` is the same without `await`, for scripts, threads and notebooks.

    from expertd import Coordinator

    async with Coordinator(["node0:50051", "node1:50051"]) as moe:
        y = await moe(layer, hidden, topk_ids=ids, topk_weights=weights)

Hugging Face models: `help("expertd.client.integrations.huggingface")`. The command line: `expertd --help`.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING

from expertd.version import VERSION

if TYPE_CHECKING:
    from expertd.client.base.gate import Gate, load_gates
    from expertd.client.call.result import MoeResult, ServerReport
    from expertd.client.config.coordinator import CoordinatorConfig
    from expertd.client.coordinator import Coordinator
    from expertd.client.fleet.discovery import DnsServers, FileServers
    from expertd.client.sync import SyncCoordinator
    from expertd.client.transport.security import ClientSecurity
    from expertd.kernels.weights.checkpoint import Checkpoint
    from expertd.proto.base.errors import (
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

__version__ = VERSION
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
GRPC_VERBOSITY = "GRPC_VERBOSITY"
SILENCED = GRPC_VERBOSITY not in os.environ
"""gRPC's core writes to standard error on its own, a line for each connection that a server ends. What there is to say
to callers expertd says, with its own log; who wants to hear gRPC too sets the variable. `expertd serve` undoes it."""
if SILENCED:
    os.environ[GRPC_VERBOSITY] = "NONE"
# gRPC reads it when it is imported. Its handlers of forks end most children of a process with calls under way, such as
# those of data loaders, and sometimes the process.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")

_HOMES = {
    "Checkpoint": "kernels.weights.checkpoint",
    "ClientSecurity": "client.transport.security",
    "Coordinator": "client.coordinator",
    "CoordinatorConfig": "client.config.coordinator",
    "DnsServers": "client.fleet.discovery",
    "FileServers": "client.fleet.discovery",
    "Gate": "client.base.gate",
    "MoeResult": "client.call.result",
    "ServerReport": "client.call.result",
    "SyncCoordinator": "client.sync",
    "load_gates": "client.base.gate",
}
"""Modules of the public names; the others are errors."""


def __getattr__(name: str) -> object:
    """A public name, imported when it is first used: torch takes seconds that `expertd --help` should not."""
    if name not in __all__:
        raise AttributeError(f"module 'expertd' has no attribute {name!r}; public names: {', '.join(__all__)}")
    module = importlib.import_module(f"expertd.{_HOMES.get(name, 'proto.base.errors')}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
