"""What callers get wrong: an error at once that names the argument and says what to give."""

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd.client.base.gate import load_gates
from expertd.client.config.coordinator import CoordinatorConfig
from expertd.client.coordinator import Coordinator
from expertd.client.fleet.discovery import FileServers
from expertd.client.sync import SyncCoordinator
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.proto.base.errors import DeadlineExceeded, ExpertdError, InvalidBatch, Unavailable
from tests.support.process import Serving, serving
from tests.support.serving import count_of, running_server

HIDDEN = torch.zeros(2, 256)
IDS = torch.tensor([[0, 1]] * 2)
ROUTED: dict[str, torch.Tensor] = {"topk_ids": IDS, "topk_weights": torch.full((2, 2), 0.5)}


@pytest.fixture(scope="module")
def server(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(small_model, tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.mark.parametrize(
    ("servers", "said"),
    [
        ("node0:50051", "give a list with at least one host:port"),
        (["localhost"], "without a port; give host:port, such as 'localhost:50051'"),
        (["http://node0:9464/metrics"], "a URL; give host:port"),
        (["::1:50051"], "IPv6 hosts in brackets"),
        (["node0:99999"], "is not host:port"),
        ([("node0", 50051)], "a tuple; give a str, such as 'node0:50051'"),
        (7, "give a list of host:port, DnsServers or FileServers"),
    ],
)
def test_what_is_no_address_is_refused_before_anything_is_dialled(servers: Any, said: str) -> None:  # noqa: ANN401
    with pytest.raises((ValueError, TypeError), match=r"servers (is|has) ") as refused:
        Coordinator(servers)
    assert said in str(refused.value)


@pytest.mark.parametrize("address", ["node0:1", "[::1]:50051", "unix:/run/expertd.sock", "10.0.0.1:65535"])
def test_what_is_an_address_is_not(address: str) -> None:
    assert repr(Coordinator([address])) == f"Coordinator([{address!r}], not connected)"


def test_a_text_is_no_path() -> None:
    wrong: Any = "/models"
    with pytest.raises(TypeError, match=r"folder is '/models', a str; give a pathlib.Path, such as Path\('/models'\)"):
        Checkpoint(wrong)
    with pytest.raises(TypeError, match="path is '/models', a str"):
        FileServers(wrong)


def test_another_event_loop_is_refused_at_once(server: Serving) -> None:
    moe = Coordinator([server.listen])
    with asyncio.Runner() as first, asyncio.Runner() as second:
        first.run(moe.connect())

        async def submit() -> None:
            await moe.submit(1, HIDDEN, **ROUTED)

        started = time.monotonic()
        for call in (lambda: moe(1, HIDDEN, **ROUTED), submit, moe.connect, moe.close):
            with pytest.raises(RuntimeError, match=r"another event loop; connect and call it within one asyncio.run"):
                second.run(call())
        assert time.monotonic() - started < 2
        assert first.run(moe(1, HIDDEN, **ROUTED)).shape == HIDDEN.shape
        first.run(moe.close())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_what_is_not_finite_is_named(server: Serving, value: float, memory: int) -> None:
    hidden = torch.randn(5, 256)
    hidden[3, 7] = value
    routed = {"topk_ids": torch.tensor([[0, 1]] * 5), "topk_weights": torch.full((5, 2), 0.5)}
    with SyncCoordinator([server.listen], CoordinatorConfig(shared_memory_bytes=memory)) as moe:
        with pytest.raises(InvalidBatch, match=rf"hidden\[3, 7\] is {value}; hidden states must be finite"):
            moe(1, hidden, **routed)
        with pytest.raises(InvalidBatch, match="layer is '1', a str; give an int"):
            moe("1", HIDDEN, **ROUTED)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [torch.nan, -torch.inf])
@pytest.mark.parametrize("sent", [torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("memory", [0, 1 << 30])
async def test_what_is_not_finite_is_named_before_it_reaches_a_server(
    small_model: Path, value: float, sent: torch.dtype, given: torch.dtype, memory: int
) -> None:
    hidden = torch.randn(300, 256).to(given)
    hidden[271, 7] = value
    routed = {"topk_ids": torch.tensor([[0, 12]] * 300), "topk_weights": torch.full((300, 2), 0.5)}
    config = CoordinatorConfig(shared_memory_bytes=memory, hidden_dtype=sent)
    named = rf"^hidden\[271, 7\] is {value}; hidden states must be finite"
    async with running_server(small_model, range(16)) as server, Coordinator([str(server.address)], config) as moe:
        with pytest.raises(InvalidBatch, match=named):
            await moe(1, hidden, **routed)
        with pytest.raises(InvalidBatch, match=named):
            await moe.submit(1, hidden, **routed)
        assert count_of(server, "invalid_argument") == 0
        # What goes to nobody is nobody's concern.
        hidden[271], routed["topk_ids"][271] = 0, -1
        assert (await moe(1, hidden, **routed)).isfinite().all()


async def test_not_the_logits_but_the_hidden_states_are_named_where_there_is_a_gate(small_model: Path) -> None:
    hidden = torch.randn(2, 256)
    hidden[1, 5] = torch.nan
    with Checkpoint(small_model) as checkpoint:
        config = CoordinatorConfig(gates=load_gates(checkpoint, (1,)))
    async with running_server(small_model, range(16)) as server, Coordinator([str(server.address)], config) as moe:
        with pytest.raises(InvalidBatch, match=r"^hidden\[1, 5\] is nan"):
            await moe(1, hidden)


@pytest.mark.parametrize(
    ("kind", "of"), [(InvalidBatch, ValueError), (Unavailable, ConnectionError), (DeadlineExceeded, TimeoutError)]
)
def test_errors_are_of_the_kinds_that_python_has(kind: type[ExpertdError], of: type[Exception]) -> None:
    error = kind("what it was", retry_after=0.5)
    with pytest.raises(of, match=r"^what it was$"):
        raise error
    assert (error.retry_after, str(error.again("x: "))) == (0.5, "x: what it was")
