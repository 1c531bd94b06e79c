"""The native core, `native/`: what is too hot for Python, computed without the interpreter's lock where that is long.

Memory comes as addresses in this process, which must hold what is stated and stay alive during the call; nothing checks
that here. `expertd.kernels.numerics.tokens` takes tensors instead, and does; `StraightCall` takes tensors itself.
Elements of a row lie side by side, aligned or not; `Place` is the address of a matrix and the bytes from one of its
rows to the next.

Results depend neither on the instruction set nor on the number of threads. Above 256 KiB a call spreads over threads
that all calls share: as many as there are usable CPUs (affinity and cgroup quota), but no more than 8, the calling one
among them. They start when they are first needed, and anew in a child made by fork.
"""

import enum
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor, dtype
from typing_extensions import Buffer

Place: TypeAlias = tuple[int, int]
Format: TypeAlias = int
BFLOAT16: Format
FLOAT16: Format
FLOAT32: Format
FLOAT8: Format
"""E4M3, with a scale for each 1x128 block: of parts of sums alone."""

def instruction_set() -> str:
    """What the next calls compute with: avx512, avx2, sse4.2 (checksums only), armv8-crc (the same) or portable."""

def use_instruction_set(name: str, /) -> bool:
    """Compute with another one from now on, for tests; False, changing nothing, where this processor lacks it."""

def pool_size() -> int:
    """Threads that compute at once at most, the calling one among them."""

def limit_spin(us: int) -> None:
    """Have threads of the pool that have no work look for it for `us` microseconds at most, from now on."""

class Room:
    """Writable bytes with anything in them, for a result: what an earlier one of about the size left, if there is one.

    The process keeps up to 512 MiB of what was left. Raises MemoryError.
    """

    def __init__(self, size: int) -> None: ...
    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def usable_cpus() -> int:
    """CPUs that this process may use, by affinity and the quotas of its control groups, rounded up; at least 1."""

def crc32c(data: Buffer, value: int = 0) -> int:
    """CRC-32C of contiguous bytes that follow others with checksum `value`."""

def quantize(hidden: Place, stored: Format, tokens: int, width: int, out: Place, scales: Place, /) -> bool:
    """hidden [tokens, width] -> out [tokens, width] E4M3 and scales [tokens, width / 128] FP32, one a 1x128 block.

    Bit-equal to `expertd.kernels.numerics.quantize.quantize_activations` on CPUs, NaN and infinity included. Whether
    all values are finite.
    """

def convert_mxfp4(
    packed: Place, exponents: Place, rows: int, columns: int, out: Place, scales: Place, /
) -> tuple[int, bool]:
    """MXFP4, packed [rows, columns / 2] with exponents [rows, columns / 32] of which none is 255, -> out E4M3
    [rows, columns] and scales [rows / 128, columns / 128] FP32, one a 128x128 block. On the calling thread alone.

    Bit-equal to `expertd.kernels.numerics.mxfp4.convert`. How many weights are not what was stored, and whether any is
    not zero. `ValueError` unless rows and columns are multiples of 128.
    """

def copy(source: int, size: int, out: int, /) -> None:
    """Copy `size` bytes between addresses; the places do not overlap."""

def gather(source: Place, rows: int, row_bytes: int, indices: int, count: int, out: Place, /) -> None:
    """out[i] = source[indices[i]] for [count] int64 indices; `IndexError` unless all are from 0 to `rows` - 1."""

def split(
    ids: int, weights: int, tokens: int, top_k: int, owner: int, experts: int, shares: int, out: tuple[int, int, int], /
) -> tuple[list[tuple[int, int]], list[int]]:
    """Sort [tokens, top_k] int32 ids, negative for none, and FP32 weights by their experts' servers.

    `owner` is [shares, experts] int64: each expert's server, negative for nobody, for as many shares of the tokens, one
    after another and as equal as can be. `out` has room for tokens * top_k rows of
    int64 tokens, int32 ids [top_k] and FP32 weights [top_k]; they are written server by server, tokens ascending, -1
    and 0 where a pair is another server's. Returns (server, rows), ascending, and the chosen experts that nobody owns:
    with any, nothing is written. `IndexError` for an id that `owner` lacks.
    """

def count_pairs(ids: int, count: int, /) -> dict[int, int]:
    """How often [count] int32 ids name each expert, ascending; negative ids are none."""

SumPart: TypeAlias = tuple[Place, Format, int, int, int, Place]

def sum_parts(parts: Sequence[SumPart], rows: int, width: int, stored: Format, out: Place, /) -> None:
    """Write to each row of `out` [rows, width] its parts, added in FP32 to 0 in the order of `parts`, rounded once.

    A part is the place and format of its sums [n, width], n, the address of [n] int64 rows of `out`, and that of [n]
    FP32 weights that they are multiplied with, or 0, and the place of FLOAT8's scales [n, width/128] FP32, or (0, 0):
    values are multiplied with those first. `IndexError` unless a part's rows ascend below `rows`. `out` is
    BFLOAT16 or FLOAT32, as `stored` says; in BFLOAT16 any NaN becomes 0xffff, as torch has it on x86.
    """

# What servers run on; Linux alone has it. In a child made by fork, calls on what its parent runs raise RuntimeError. At
# the end of the interpreter engines are stopped.

class OwnedLayer:
    """What a server owns of one layer; immutable."""

    def __init__(
        self,
        layer: int,
        experts: Sequence[int],
        *,
        experts_text: str,
        key: int,
        weights: tuple[int, int, int, int] = ...,
        devices: Sequence[OwnedLayer] = ...,
    ) -> None:
        """`experts` are global ids, ascending; the text is what errors call them.

        `key` is what the backend knows the weights by; `weights` is where the device has them, for an executor that
        computes on it. With several `devices`, what each has instead: its `experts` are places in these, in any order.
        IndexError for one that is not.
        """

class Placement:
    """What a server owns, as requests are checked against it; immutable."""

    def __init__(
        self,
        *,
        model_fingerprint: str,
        epoch: int,
        layers: Sequence[OwnedLayer],
        layers_text: str,
        num_routed_experts: int,
        hidden_size: int,
        max_top_k: int,
        max_tokens: int,
        beside: Placement | None = None,
    ) -> None:
        """`layers` are ascending; the text is what errors call them. `max_tokens` is one request's.

        `beside` has other weights of the same experts, under the same epoch: requests that name its fingerprint are
        checked against it.
        """

    @property
    def epoch(self) -> int: ...

class Refusal:
    """Why a request is not answered with sums."""

    @property
    def code(self) -> int:
        """A gRPC status."""

    @property
    def text(self) -> str: ...
    @property
    def retry_after(self) -> float | None:
        """Seconds."""

class Submitted:
    """What became at once of one message: it is refused, or will be answered under `ticket`."""

    @property
    def request_id(self) -> int: ...
    @property
    def cancels(self) -> int | None:
        """The request that the message cancels: then nothing else of it counts."""

    @property
    def ticket(self) -> int | None: ...
    @property
    def refusal(self) -> Refusal | None: ...

class Answered:
    """One answer."""

    @property
    def context(self) -> Any:  # noqa: ANN401
        """What was given to `submit`."""

    @property
    def refusal(self) -> Refusal | None: ...
    @property
    def response(self) -> bytes | None:
        """The ExecuteResponse; None beside a refusal."""

    @property
    def request_id(self) -> int: ...

class Inbox:
    """Where one event loop hands in requests and finds what became of them. Used by its thread alone."""

    def __init__(self) -> None: ...
    def fileno(self) -> int:
        """Readable when there is something to `drain`."""

    def __len__(self) -> int:
        """Requests whose memory is still used."""

    def submit(
        self,
        engine: Engine,
        message: bytes,
        caller: str,
        context: object,
        time_remaining: float | None,
        traceparent: str,
        /,
        identity: str = "",
    ) -> Submitted:
        """Check an ExecuteRequest of `caller` and let it wait, for at most `time_remaining` seconds.

        `traceparent` is the caller's span where the message names none. Room and turns are shared between identities;
        turns also between the callers of each, which are its connections.
        """

    def cancel(self, engine: Engine, ticket: int, /) -> None:
        """Answer with CANCELLED: at once, or when the device is done with it; without effect on what is answered."""

    def drain(self) -> list[Answered]: ...

class Batch:
    """Requests for the backend, of one kind. Given back by `finish` or `fail`, or, failed, when it is dropped."""

    @property
    def weights_key(self) -> int:
        """What the backend knows the layer's weights by."""

    @property
    def top_k(self) -> int: ...
    @property
    def hidden_dtype(self) -> int:
        """As in the contract's DType; so is `sums_dtype`."""

    @property
    def sums_dtype(self) -> int:
        """FP32 where the reply is FP8, which native code makes of it."""

    @property
    def tokens(self) -> int: ...
    @property
    def alone(self) -> bool:
        """Small, and with nothing that could overlap it."""

    def requests(self) -> list[tuple[memoryview, memoryview | None, memoryview, memoryview, memoryview, int]]:
        """Hidden states, scales, local expert ids, weights, place of the sums and tokens of every request.

        The memory is lent until the batch is given back.
        """

    def finish(self, pairs: Sequence[int], copy_in: float, compute: float, copy_out: float) -> None:
        """Give it back with all sums in their places; `pairs` were counted by the device, of each local expert."""

    def fail(self, text: str, *, device_failed: bool = False) -> None:
        """Give it back without; `device_failed`: the device is to be looked at."""

class Sample:
    """One token of an answered request, copied: a row of each of its tensors, writable."""

    @property
    def model_fingerprint(self) -> str:
        """Of the weights that answered."""

    @property
    def layer(self) -> int: ...
    @property
    def hidden_dtype(self) -> int:
        """As in the contract's DType; so is `sums_dtype`."""

    @property
    def sums_dtype(self) -> int:
        """FP32 where the reply is FP8, which native code makes of it."""

    @property
    def hidden(self) -> bytearray: ...
    @property
    def scales(self) -> bytearray:
        """Empty where the hidden states are BF16."""

    @property
    def ids(self) -> bytearray:
        """Local ones."""

    @property
    def weights(self) -> bytearray: ...
    @property
    def sums(self) -> bytearray: ...

class Sampler:
    """Copies a token of a share of all requests whose tensors are in host memory, before they are answered."""

    def __init__(self, rate: float, seed: int) -> None: ...
    def take(self) -> Sample | None:
        """Wait for the next one, of at most 8 that wait; None after `interrupt`."""

    def interrupt(self) -> None:
        """Forget those that wait, and let `take` return from now on."""

    @property
    def dropped(self) -> int:
        """How many came while 8 waited."""

class Told:
    """A request that ended."""

    @property
    def time(self) -> float:
        """Unix time in seconds."""

    @property
    def request_id(self) -> int: ...
    @property
    def layer(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    @property
    def pairs(self) -> int: ...
    @property
    def caller(self) -> str: ...
    @property
    def traceparent(self) -> bytes: ...
    @property
    def code(self) -> int:
        """A gRPC status; of one that was answered, 0."""

    @property
    def text(self) -> str:
        """Why it was not answered."""

    @property
    def seconds(self) -> list[float]:
        """Of an answered one: decode, queue, copy in, compute, copy out, encode, total."""

class Histogram:
    """Values within ascending bounds, and beyond the last one. Any thread may observe and read."""

    def __init__(self, bounds: Sequence[float]) -> None: ...
    def observe(self, value: float) -> None: ...
    def read(self) -> tuple[list[int], float]:
        """How many within each bound but no lower one, and the sum of all."""

class Tally:
    """Counts what happens to the requests of an engine. Any thread may read."""

    def __init__(
        self,
        layers: Sequence[int],
        experts: int,
        second_bounds: Sequence[float],
        token_bounds: Sequence[float],
        fine_bounds: Sequence[float] = (),
    ) -> None:
        """Of histograms; `fine_bounds`, if there are any, of those of computing and of the total."""

    def tell_of(self, *, everything: bool, traced: bool) -> None:
        """Which requests `take_told` has: all, or those that their callers trace; none at first."""

    def take_told(self) -> tuple[list[Told], int]:
        """The requests that ended since the last time, and how many were dropped because there were too many."""

    def answers(self) -> list[tuple[float, int, tuple[float, ...]]]:
        """Monotonic time in seconds, tokens and `Told.seconds` of the latest 1000 answers."""

    def refusals(self) -> list[Told]:
        """The latest 20."""

    @property
    def in_flight(self) -> int: ...
    def outcomes(self, code: int, /) -> int: ...
    @property
    def evictions(self) -> int:
        """Requests whose room others got."""

    @property
    def tokens(self) -> int: ...
    @property
    def pairs(self) -> int: ...
    @property
    def busy_seconds(self) -> float: ...
    def stages(self) -> list[tuple[list[int], float]]:
        """A histogram for each of `Told.seconds`."""

    def refusal_seconds(self) -> tuple[list[int], float]: ...
    def failure_seconds(self, code: int, /) -> tuple[list[int], float]:
        """From arrival on, of requests that ended with this gRPC status, which is not OK."""

    def callers(self) -> list[tuple[str, int, int]]:
        """Identity, tokens of answers and refusals of the heaviest callers; all three of one begin when it is one."""

    def other_callers(self) -> tuple[int, int]:
        """Tokens of answers and refusals of all others, when they were no heavy ones."""

    def batch_tokens(self) -> tuple[list[int], float]: ...
    def queue_wait(self, layer: int, /) -> tuple[int, float]:
        """Requests and seconds, of the layer at this index."""

    def expert_pairs(self) -> bytes:
        """[layers, experts] uint64."""

class Executor:
    """What computes an engine's batches."""

    @property
    def depth(self) -> int:
        """Batches that may be under way at once."""

class Failpoints:
    """Faults on purpose, by kind; `Engine.use_failpoints` has them strike. Any thread may use it."""

    def __init__(self, seed: str) -> None:
        """The same `seed` repeats each kind's strikes."""

    def add(self, kind: str, probability: float, seconds: float) -> None:
        """Before anything strikes."""

    def strikes(self, kind: str, /) -> bool:
        """Whether it does, this time."""

    def seconds(self, kind: str, /) -> float:
        """How long a kind lasts that has struck."""

    def fileno(self) -> int:
        """Readable when there is something for `take_strikes`."""

    def take_strikes(self) -> list[tuple[str, str]]:
        """Kind, and the caller whose connection is to be ended, of those since the last time.

        After a crash the engine does nothing any more: who takes it kills the process.
        """

class Mapping:
    """A memfd of `size` bytes, mapped here; its buffer is the memory."""

    def __init__(self, descriptor: int, size: int) -> None:
        """Takes 0.1 s for a few hundred MB. Raises OSError."""

    def close(self) -> None:
        """Unmap it, which takes as long; nobody may look at it any more."""

    @property
    def broken(self) -> bool:
        """Whether a page was lost."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class FreeList:
    """Hands out parts of `begin` to `end`, the first that fits; neighbours that are given back grow together again."""

    def __init__(self, begin: int, end: int) -> None: ...
    def take(self, length: int) -> int | None:
        """Where `length` bytes are now taken, or None when no gap is long enough."""

    def give_back(self, begin: int, length: int) -> None: ...

class ClientLane:
    """The caller's end of a lane: memory of its own, to be handed over, and the socket beside it.

    Any thread may call `take`, `give_back`, `post`, `wait`, `reply` and `cancel`; `poll` and `reap` are for the one
    that watches `socket`.
    In a forked child everything raises RuntimeError.
    """

    def __init__(self, size: int, entries: int, spin_us: int | None = None, posted_by_gpu: bool = False) -> None:
        """`size` bytes, of which those from `data` on are for slots and tensors; `wait` spins for `spin_us` at most.

        None: for as long as is worth it. With `posted_by_gpu` a GPU posts, which cannot ring: `nudge` does.
        Raises OSError, and ValueError for sizes that no lane has.
        """

    @staticmethod
    def data_at(entries: int) -> int:
        """Where `data` is behind a ring of so many entries."""

    @property
    def descriptor(self) -> int:
        """The memory's file; the lane's own."""

    @property
    def socket(self) -> int: ...
    @property
    def memory(self) -> Mapping: ...
    @property
    def data(self) -> int: ...
    @property
    def ended(self) -> bool: ...
    @property
    def in_flight(self) -> int: ...
    @property
    def reason(self) -> bytes:
        """The ExecuteResponse that says why the server ended the lane; empty if there is none."""

    @property
    def free_bytes(self) -> int: ...
    def take(self, length: int) -> int | None:
        """Where so many bytes for slots and tensors are, at a multiple of 64, or None when there is no room."""

    def give_back(self, at: int, length: int) -> None: ...
    def connect(self, socket: int) -> None:
        """Take the socket, once the server has accepted the memory."""

    def post(self, slot: int, request: bytes, reply_room: int, looped: bool = False) -> bool:
        """Announce a request whose tensors are in place; False when there is no room in the ring.

        With `looped`, `poll` names it when it is done. ValueError for a place that no call can be in, ConnectionError
        once the lane has ended.
        """

    def nudge(self) -> None:
        """Wake a server that sleeps: a GPU is about to post."""

    def wait(self, slot: int, timeout: float | None = None) -> bool | None:
        """True when the call is done, False once the lane has ended without it, None after `timeout` seconds."""

    def reply(self, slot: int) -> bytes | None:
        """The reply to a call that is done, which is then no longer in flight."""

    def cancel(self, slot: int) -> bool:
        """Whether the slot stays the server's until `reap` names it; else it is free."""

    def reap(self) -> list[int]:
        """The cancelled calls that are done now: their memory is the caller's again."""

    def poll(self) -> list[int]:
        """When `socket` is readable: the looped calls that are done. What comes after it makes `socket` readable."""

    def close(self) -> None: ...

class PartState(enum.Enum):
    POSTED = ...
    ANSWERED = ...
    """With what was asked for."""
    REFUSED = ...
    """With anything else."""
    FULL = ...
    """There was no room in the ring."""
    ENDED = ...
    """The lane ended first."""

class Owner:
    """A server: how it is reached, and what requests to it say; `number` is by what calls name it.

    If `checked`, requests to it have checksums, and its sums in lanes too.
    """

    def __init__(
        self,
        number: int,
        lanes: Sequence[ClientLane],
        fingerprint: str,
        epoch: int | None,
        chunk_tokens: int,
        reply_room: int,
        checked: bool,
    ) -> None: ...
    @property
    def checked(self) -> bool: ...

Stages: TypeAlias = tuple[float, float, float, float, float]
"""Seconds of decode, queue, copy_in, compute and copy_out."""
PartReport: TypeAlias = tuple[int, int, int, float, Stages]
"""Number of the server, tokens, pairs, and seconds from posting to the reply."""
CallPart: TypeAlias = tuple[int, bytes, bytes, bytes, PartState, bytes, bytes, float, int]
"""Number of the server; int64 tokens, int32 ids and float32 weights; what became of it; reply, sums, seconds; request
id."""

class KeptSums:
    """[T, H] of the replies' dtype in a lane's memory, which is another call's once the last view of it is gone."""

    def __len__(self) -> int: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

class StraightCall:
    """One call of a layer that goes straight to servers: written, awaited and summed in native code."""

    @staticmethod
    def begin(
        owners: Sequence[Owner],
        hidden: Tensor,
        ids: Tensor,
        weights: Tensor,
        terms: tuple[int, dtype, dtype, int, float | None, Sequence[str]],
        *,
        scales: Tensor | None = None,
        chosen: Tensor | None = None,
        looped: bool = False,
        in_place: bool = False,
    ) -> StraightCall | None:
        """Post the requests of [T, H] hidden states with contiguous [T, k] int32 or int64 ids and float32 weights.

        All are on the CPU. They go to the `chosen` owner of each expert by its number, [shares, n_routed_experts]
        int64, for as many shares of the tokens, one after another, or all to the only owner. With `scales`
        [T, H/128] hidden states are FP8 already. `terms`: layer, dtype of hidden states as they travel and of replies,
        request_id, seconds that servers need not exceed, and a traceparent for each owner or none. None where the
        straight way is none, whatever the reason. Raises `ValueError` for other tensors.

        With `in_place`, sums that one owner has of all tokens stay in a lane's memory, see `keep`, where they are not
        FP8 and the lanes keep room for as large a call: then the call is `in_place`.
        """

    @property
    def in_place(self) -> bool: ...
    @property
    def messages(self) -> list[tuple[int, int, int, bytes]]:
        """What is to be sent to servers without lanes: part, server, request id and ExecuteRequest."""

    def answer(self, part: int, response: bytes | None) -> None:
        """What came back for the message of a part; None when nothing will. Any thread, even after `drop`."""

    @property
    def planned(self) -> list[tuple[int, int]]:
        """Server and tokens of each part."""

    def finish(self, timeout: float | None, out: Tensor | None = None) -> list[PartReport] | None:
        """Wait for at most so many seconds until all parts are done, or lost; write the sums to `out` [T, H].

        That is bfloat16, float16 or float32 on the CPU, else `ValueError`. Sums of many tokens are written while others
        are computed. None unless all are answered as they were sent. Of a call in place there is no `out`.
        """

    def keep(self) -> KeptSums:
        """The sums of a call in place, once `finish` has said that they are there."""

    def collect(self) -> bool:
        """Whether all parts are done, or lost."""

    def lose(self, number: int) -> None:
        """Wait no longer for that server. Any thread; on one that waits it works within 100 ms."""

    def drop(self) -> None:
        """Cancel what is not done, after a `finish` that another thread is in. Nothing else may be called after it."""

    def slots(self) -> list[tuple[ClientLane, int]]:
        """Of the parts that are not done: for looped calls, what their lanes' `poll` names."""

    def parts(self) -> list[CallPart]: ...

def response_id(response: bytes) -> int | None:
    """Which request an ExecuteResponse answers; None for what is malformed."""

class CallbackExecutor(Executor):
    """Batches for Python's threads."""

    def __init__(self, depth: int, *, express: bool = False) -> None:
        """`express`: whether a batch of fewer than 256 tokens may be under way beside `depth` others."""

    def fetch(self) -> Batch | None:
        """Wait for a batch; None after `interrupt`."""

    def interrupt(self) -> None:
        """Let one `fetch` return without a batch, now or when it comes."""

class Adder:
    """Adds up what several devices have computed, where they have it."""

def peer_adder(devices: Sequence[Executor]) -> Adder | None:
    """One for executors of GPUs that all reach each other's memory, as they do from then on; else None. DeviceError."""

class NodeExecutor(Executor):
    """Several devices as one executor: a batch goes to those that have its experts, and what more than one computed is
    added up in FP32, in their order, and rounded once.

    Which of the devices with an expert computes a pair is decided by the bits of its routing weight. A batch that a
    device failed to compute is computed by others, if they have all its experts.
    """

    def __init__(
        self, devices: Sequence[Executor], failpoints: Failpoints | None = None, adder: Adder | None = None
    ) -> None:
        """Without an `adder`, sums are added up on the host."""

    def lose(self, device: int, *, hangs: bool) -> None:
        """Compute nothing on a device, by its place, any more; callers of what one has that `hangs` get UNAVAILABLE."""

    def check(self, device: int) -> None:
        """RuntimeError once a failpoint has killed it."""

    @property
    def adds_on_devices(self) -> bool:
        """Whether it has an adder."""

    @property
    def adding_seconds(self) -> float: ...
    def records(self) -> list[tuple[int, int, float, float, float]]:
        """Of each device: batches, failures among them, and seconds of copying in, computing and copying out."""

class Engine:
    """Takes requests, decides their order, has them computed and answers them, on a thread without Python's lock."""

    def __init__(
        self,
        placement: Placement,
        *,
        max_batch_tokens: int,
        max_queued_tokens: int,
        max_queued_bytes: int,
        tally: Tally,
        spin_us: int | None = None,
    ) -> None:
        """Closed at first. Between two requests its thread spins for `spin_us` at most; None: as is worth it."""

    placement: Placement
    """Of requests that come from now on."""

    def uses_before(self, epoch: int) -> bool:
        """Whether requests may still use weights of placements before that of `epoch`, or beside those."""

    def add_lane(
        self,
        mapping: Mapping,
        socket: int,
        caller: str,
        *,
        identity: str = "",
        pinned: bool = False,
        gpu_address: int = 0,
        gpu_bytes: int = 0,
        of_peer: bool = False,
    ) -> int:
        """Serve the lane in `mapping`; its number. `socket` may be closed then: the engine has its own descriptor.

        The `gpu_bytes` at `gpu_address` are mapped for the GPU that computes, or are another one's, `of_peer`.
        ValueError for a memory that is no lane.
        """

    @property
    def min_reply_room(self) -> int:
        """What every slot must leave for a reply."""

    def lanes_fileno(self) -> int:
        """Readable when there is something for `take_ended_lanes`."""

    def take_ended_lanes(self) -> list[int]:
        """Lanes whose memory nobody uses any more."""

    def drain_lanes(self) -> None:
        """Take nothing more; each lane ends once what it posted is answered."""

    def disconnect_lanes(self) -> None:
        """At once, even while the engine hangs; memory stays lent until the device is done with it."""

    def sample(self, sampler: Sampler) -> None:
        """Have tokens of answered requests sampled, before `start`."""

    def use_failpoints(self, failpoints: Failpoints) -> None:
        """Have faults strike, before `start`."""

    def use(self, executor: Executor, /) -> None:
        """Say what computes, before `start`."""

    def start(self) -> None: ...
    def stop(self) -> bool:
        """End the thread; what is not answered by then never will be.

        False after a second in which it did not end: it may go on, and all that it uses is kept for ever.
        """

    def turn(self, now_ns: int) -> bool:
        """What the thread does again and again, for tests without one; whether there was something to do."""

    def open(self) -> None: ...
    def close(self, reason: str, *, refusing: bool = True) -> None:
        """Refuse new requests with UNAVAILABLE; those already accepted are still answered.

        Not yet `refusing`, only `closed_because` tells new callers.
        """

    def abandon(self, reason: str) -> None:
        """Answer everyone who waits, and refuse new requests, with UNAVAILABLE."""

    def check_room(self, tokens: int, num_bytes: int, identity: str = "") -> Refusal | None:
        """Why a request of this size would be refused now."""

    @property
    def closed_because(self) -> str | None: ...
    @property
    def queued_tokens(self) -> int: ...
    @property
    def queued_bytes(self) -> int: ...
    @property
    def handed_out(self) -> int:
        """What other threads do for it now."""

    def fault_fileno(self) -> int:
        """Readable when there is something for `take_fault`: why the device must be looked at."""

    def take_fault(self) -> str | None: ...
    def await_turn(self) -> None:
        """Wait until the thread has looked for work: a sign of its life, that may never come.

        RuntimeError once a failpoint has broken the device.
        """

class DeviceError(RuntimeError):
    """What the device or its driver refused."""

class CudaBatch:
    """A batch under way. What it tells is known once it was waited for."""

    @property
    def pairs(self) -> list[int]:
        """Counted by the device, of each local expert."""

    @property
    def seconds(self) -> tuple[float, float, float]:
        """Copying in until the first part could begin, computing all, copying out the last."""

    @property
    def measured(self) -> bool:
        """Whether `seconds` are this batch's; else those of the last one of its kind that was timed."""

    @property
    def elapsed(self) -> float:
        """Seconds from its start to when its end was seen."""

class CudaExecutor:
    """Computes batches with CUDA graphs. Linux only; finds the driver when it is made, else raises `DeviceError`.

    Any thread may use it until an engine takes it: then it raises `RuntimeError`.
    """

    def __init__(
        self,
        device: int,
        *,
        depth: int,
        hidden_size: int,
        num_experts: int,
        max_top_k: int,
        classes: Sequence[int],
        max_tokens: int,
        overlap_tokens: int | None = None,
        time_every: int = 1,
        express_rows: int = 0,
    ) -> None:
        """Allocate all memory, for `depth` batches of up to `max_tokens` tokens at once.

        Kernels compute up to `classes[-1]` tokens at once, padded to one of `classes`, ascending. Longer batches are
        computed in parts, and so are those longer than `overlap_tokens` of which the host has any rows. One of
        `time_every` small batches of a kind is timed. Graphs of up to `express_rows` may run beside one of the others:
        they need temporaries of their own.
        """

    @property
    def depth(self) -> int: ...
    @property
    def classes(self) -> list[int]: ...
    @property
    def max_top_k(self) -> int: ...
    @property
    def express_rows(self) -> int: ...
    def cut(self, tokens: int, on_host: bool) -> tuple[int, int, int]:
        """Parts of a batch, tokens of each but the last, and the class that they are padded to."""

    def places(self, bay: int, tokens: int, hidden_dtype: int, reply_dtype: int) -> dict[str, int]:
        """Device addresses of ids, weights, hidden, scales, sums and pairs of a batch of a class in a bay."""

    def add_graphs(
        self, tokens: int, hidden_dtype: int, reply_dtype: int, graphs: Sequence[int], layer: Sequence[tuple[int, int]]
    ) -> None:
        """Copy the graphs captured for a class in bay 0, given where and how long the layer's weights were.

        More than one are steps, each of which leaves the next of as many equal shares of the sums' columns: for a
        request that fills the class and is in another device's memory, whose sums are copied there step by step.
        """

    def start(
        self,
        layer: tuple[int, int, int, int],
        hidden_dtype: int,
        reply_dtype: int,
        top_k: int,
        requests: Sequence[tuple[int, int, int, int, int, int, int]],
        keep: object,
    ) -> CudaBatch:
        """Start a batch with the weights at these addresses; `keep` is kept until it is over.

        A request: addresses of hidden states, scales (0: none), int32 ids, FP32 weights and of the sums; tokens; where
        the first two and the last are: in pageable memory (0), pinned memory (1), on the device (2) or on another (3).
        """

    def wait(self, batch: CudaBatch) -> None:
        """Until a batch is over. Raises `DeviceError` if it failed."""

    def add_adder(self, dtype: int, *, graph: int, result: tuple[int, int], parts: Sequence[tuple[int, int]]) -> None:
        """Take a captured graph that adds `parts`, 2 to 8 of [rows, hidden size] FP32, into rows of `dtype`, a block in
        the grid's first dimension for each row; each is where it was captured with, and its bytes."""

    def take(self) -> Executor:
        """For an engine, which alone uses it from then on; waits for what is under way."""

    def drain(self) -> None:
        """Until no batch is under way."""
