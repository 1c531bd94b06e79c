"""The client in the shell, which learns the contract from the server, gets what the Python client gets."""

import asyncio
import base64
import json
import os
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from google.protobuf import json_format
from torch import Tensor

from expertd.client.transport.grpc_streams import GrpcTransport
from expertd.proto.codec import ExecuteCall, ExecuteResult
from expertd.server.app import Server
from tests.support.programs import find_program
from tests.support.serving import call_for, random_batch, request_for, running_server

SCRIPT = Path(__file__).parents[3] / "client" / "examples" / "buf-curl" / "client.sh"


@pytest.fixture
async def server(small_model: Path) -> AsyncIterator[Server]:
    async with running_server(small_model, range(4, 12)) as running:
        yield running


async def client(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of the script."""
    find_program("jq", package="jq")
    process = await asyncio.create_subprocess_exec(
        str(SCRIPT),
        *arguments,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await asyncio.wait_for(process.communicate(), 120)
    return process.returncode or 0, stdout.decode(), stderr.decode()


async def from_python(server: Server, call: ExecuteCall) -> ExecuteResult:
    transport = GrpcTransport(str(server.address))
    try:
        return await transport.execute(call)
    finally:
        await transport.close()


def partials(response: dict[str, Any]) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(response["partials"])), dtype=torch.float32)


async def test_a_request_in_json_gets_the_bits_of_the_python_client(server: Server, tmp_path: Path) -> None:
    batch = random_batch(9, 256, 16, 4)
    batch.expert_ids[(batch.expert_ids < 4) | (batch.expert_ids >= 12)] = -1
    (tmp_path / "request.json").write_text(json_format.MessageToJson(request_for(server, batch)))
    code, stdout, stderr = await client(str(server.address), str(tmp_path / "request.json"))
    assert code == 0, stderr
    response = json.loads(stdout)
    expected = await from_python(server, call_for(server, batch))
    assert torch.equal(partials(response).view_as(expected.partials), expected.partials)
    assert expected.partials.any()
    receipt = dict(zip(response["receiptExperts"], response["receiptPairs"], strict=True))
    assert receipt == expected.receipt


async def test_without_a_request_it_shows_the_server_and_computes_ones(server: Server) -> None:
    code, stdout, stderr = await client(str(server.address))
    assert code == 0, stderr
    assert '"status": "SERVING"' in stdout
    assert f'"modelFingerprint": "{server.shard.model_fingerprint}"' in stdout
    call = call_for(
        server,
        random_batch(1, 256, 16, 4),
        hidden=torch.ones(1, 256, dtype=torch.bfloat16),
        scales=None,
        expert_ids=torch.tensor([[4, 5, 6, 7]], dtype=torch.int32),
        weights=torch.ones(1, 4),
    )
    printed = [float(number) for number in re.split(r"outputs:\n", stdout)[1].split()]
    torch.testing.assert_close(torch.tensor([printed]), (await from_python(server, call)).partials)


async def test_a_refusal_is_the_servers(server: Server, tmp_path: Path) -> None:
    request = request_for(server, random_batch(1, 256, 16, 4), layer=0)
    (tmp_path / "request.json").write_text(json_format.MessageToJson(request))
    code, _, stderr = await client(str(server.address), str(tmp_path / "request.json"))
    assert code != 0
    assert "layer is 0; this server owns layers 1-2" in stderr


async def test_how_to_use_it_is_said() -> None:
    code, _, stderr = await client()
    assert (code, stderr) == (2, "usage: client.sh HOST:PORT [REQUEST.json]\n")
