"""How a coordinator talks to its servers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from expertd.client.base.gate import Gate
from expertd.client.telemetry.metrics import CoordinatorMetrics
from expertd.client.transport import grpc_streams, shared_memory
from expertd.client.transport.security import ClientSecurity
from expertd.proto.codec import HIDDEN_DTYPES, REPLY_DTYPES
from expertd.proto.lane.layout import tokens_within

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

MOST_SECONDS = 1e9
"""That a call can be waited for: nanoseconds have 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig:
    """How a coordinator talks to its servers; docs/configuration.md describes the fields. Times are in seconds."""

    gates: Mapping[int, Gate] = field(default_factory=dict)
    """Router by layer, for calls that give hidden states alone and for `router_logits` (whose bias is the gate's)."""
    hidden_dtype: torch.dtype = torch.float8_e4m3fn
    """What hidden states are sent as: float8_e4m3fn, or bfloat16 (no quantisation, twice the bytes)."""
    reply_dtype: torch.dtype = torch.bfloat16
    """What servers send partial sums as: bfloat16, float32 (twice the bytes), or float8_e4m3fn with one scale a 1x128
    block (half the bytes, an error below 1/16 of each part); the last not where GPU memory is shared with a server."""
    output_dtype: torch.dtype = torch.bfloat16
    """What calls return; sums are FP32 whatever it is."""
    chunk_bytes: int = grpc_streams.CHUNK_BYTES
    """Batches are split by tokens so that no message exceeds this, and sending, computing and receiving overlap."""
    shared_memory_bytes: int = 1 << 30
    """At most as much, of host memory and of each GPU's, is shared with each server on this machine that allows it; 0:
    none, everything goes over gRPC."""
    shared_memory_chunk_bytes: int = shared_memory.CHUNK_BYTES
    """Like `chunk_bytes`, for calls through shared memory."""
    shared_results: bool = False
    """Whether results of 256 KiB or more that one server computed stay in the memory shared with it, as long as calls
    find room beside them, which saves a copy. Not where processes fork and use them: a child has no such memory."""
    spin_us: int | None = None
    """For so many microseconds at most a thread looks for an answer in shared memory before it sleeps; None: as is
    worth it on this machine; 0: not at all. Threads that quantise and add for all coordinators of the process look for
    work as long at most. Event loops always sleep."""
    checksums: Literal["plain", "always"] = "plain"
    """Which requests have checksums, by which servers find what was altered on its way: those over gRPC without TLS, or
    all; then sums in shared memory have them, too. Answers over gRPC always do, and tensors on a GPU never."""
    channels: int = 2
    """Connections to each server; chunks go to the one with the least in flight."""
    connect_timeout: float = 10.0
    """For the first answers of all servers, together."""
    call_timeout: float = 60.0
    """For a whole call, repeated attempts included."""
    attempt_timeout: float = 20.0
    """For one attempt on one server, after which another owner of the experts is asked."""
    max_attempts: int = 4
    """On servers that cannot be reached, fail or are overloaded."""
    retry_ratio: float = 0.2
    """Repeated attempts for each first one, in the long run: when everything fails, load does not multiply."""
    retry_burst: int = 256
    """Repeated attempts at once, such as for all that one dead server leaves unanswered."""
    hedge_quantile: float | None = None
    """Ask another owner as well when an answer takes longer than this share of the newest ones, such as 0.99; the
    first answer counts. None: never."""
    owner_timeout: float = 1.0
    """How long calls wait for experts whose last owner has just been lost."""
    on_missing: Literal["error", "renormalize"] = "error"
    """When nobody can compute an expert: raise, or leave it out and scale up the token's other weights accordingly;
    the result then says how many tokens that befell."""
    model_fingerprint: str | None = None
    """Of the model to call, as `expertd fingerprint` or `GetShard` tell it; servers of others are never used. None: the
    one that all servers hold, or the only one of which every expert has an owner; when a fleet goes over to another
    model of the same shape, so does the coordinator."""
    locality: str = ""
    """Where this coordinator is: servers that were started with the same --locality are preferred. Empty: no matter."""
    security: ClientSecurity | None = None
    """Certificates and token; without it, plaintext."""
    metrics: CoordinatorMetrics = field(default_factory=CoordinatorMetrics, compare=False, repr=False)
    """What is counted; give one with a registry to export it."""
    tracer: Tracer | None = field(default=None, compare=False, repr=False)
    """Of OpenTelemetry, to trace calls with; servers add their spans to those that are sampled."""

    def __post_init__(self) -> None:
        if self.hidden_dtype not in HIDDEN_DTYPES:
            raise ValueError(f"hidden_dtype is {self.hidden_dtype}; choose from {HIDDEN_DTYPES}")
        if self.reply_dtype not in REPLY_DTYPES:
            raise ValueError(f"reply_dtype is {self.reply_dtype}; choose from {REPLY_DTYPES}")
        if self.on_missing not in ("error", "renormalize"):
            raise ValueError(f"on_missing is {self.on_missing!r}; choose from error, renormalize")
        if self.checksums not in ("plain", "always"):
            raise ValueError(f"checksums is {self.checksums!r}; choose from plain, always")
        if self.hedge_quantile is not None and not 0.5 <= self.hedge_quantile < 1.0:
            raise ValueError(f"hedge_quantile is {self.hedge_quantile}; it must be from 0.5 to below 1")
        for name in ("retry_ratio", "retry_burst", "owner_timeout"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("connect_timeout", "call_timeout", "attempt_timeout", "max_attempts"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be greater than 0")
        for name in ("call_timeout", "attempt_timeout"):
            if not getattr(self, name) <= MOST_SECONDS:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at most {MOST_SECONDS:.0f} seconds")
        for name in ("chunk_bytes", "shared_memory_chunk_bytes", "channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("shared_memory_bytes", "spin_us"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} is {value}; it must be at least 0")

    @property
    def checks_all(self) -> bool:
        """Whether requests in shared memory and over TLS have checksums, too."""
        return self.checksums == "always"

    def chunk_tokens(self, hidden_size: int, chunk_bytes: int) -> int:
        """Tokens of a chunk: as many as keep both the request and the reply within the bytes, at least one."""
        return tokens_within(chunk_bytes, hidden_size, self.hidden_dtype, self.reply_dtype)
