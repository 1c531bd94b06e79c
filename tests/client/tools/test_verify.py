"""`expertd verify` against servers in this process, right ones and wrong ones."""

import asyncio
import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from expertd import cli
from expertd.kernels.torch.backend import TorchBackend
from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.proto import codec
from expertd.server.app import Server
from tests.support.certificates import Authority
from tests.support.families import FamilyFolders
from tests.support.mutations import DAMAGED, MUTATIONS, OTHER, Tensors, rot
from tests.support.serving import open_channel, running_server


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def servers(self) -> list[dict[str, Any]]:
        """What `--json` printed."""
        return list(json.loads(self.out)["servers"])

    @property
    def wrong(self) -> set[tuple[int, int | None]]:
        """(layer, expert) of every comparison past a bound; None for a whole layer."""
        comparisons = [one for server in self.servers for one in server["comparisons"]]
        return {(one["layer"], one["expert"]) for one in comparisons if one["faults"]}


Verify = Callable[..., Any]


@pytest.fixture
def verify(capsys: pytest.CaptureFixture[str]) -> Verify:
    """Run the command beside the servers, whose event loop is this thread's."""

    async def command(*arguments: object) -> Outcome:
        code = await asyncio.to_thread(cli.main, ["verify", *map(str, arguments)])
        return Outcome(code, *capsys.readouterr())

    return command


def copy_of(model: Path, folder: Path) -> Path:
    return shutil.copytree(model, folder / "served")


async def test_right_servers_pass_with_either_reference(small_model: Path, verify: Verify) -> None:
    async with (
        running_server(small_model, range(8)) as low,
        # Batches are split to what a server takes.
        running_server(small_model, range(8, 16), max_tokens_per_request=7) as high,
    ):
        for model in ((), ("--model", small_model)):
            outcome = await verify(low.address, high.address, *model, "--json")
            assert (outcome.code, outcome.wrong) == (0, set())
            first, second = outcome.servers
            assert [(one["layer"], one["expert"]) for one in first["comparisons"]] == [
                (layer, expert) for layer in (1, 2) for expert in (*range(8), None)
            ]
            assert {one["expert"] for one in second["comparisons"]} == {*range(8, 16), None}
            assert all(one["relative_error"] < 1e-6 for one in first["comparisons"])


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
async def test_a_server_of_a_damaged_checkpoint_fails(
    small_model: Path, tmp_path: Path, mutation: Callable[[Tensors], None], verify: Verify
) -> None:
    served = copy_of(small_model, tmp_path)
    rot(served, 2, mutation)
    damaged: set[tuple[int, int | None]] = {(2, DAMAGED), (2, None)}
    if mutation is MUTATIONS["two experts swapped"]:
        damaged.add((2, OTHER))
    async with running_server(served, range(16)) as server:
        outcome = await verify(server.address, "--model", small_model, "--json")
        assert (outcome.code, outcome.wrong) == (1, damaged)
        # By its own files the server is right.
        assert (await verify(server.address)).code == 0


async def test_fp8_replies_have_bounds_of_their_own(small_model: Path, tmp_path: Path, verify: Verify) -> None:
    fp8 = ("--reply-dtype", "float8_e4m3fn", "--json")
    async with running_server(small_model, range(16)) as server:
        outcome = await verify(server.address, "--model", small_model, *fp8)
        assert (outcome.code, outcome.wrong) == (0, set())
        (found,) = outcome.servers
        assert found["bounds"]["relative_error"] == pytest.approx(3e-2, rel=1e-3)
        assert all(2e-2 < one["relative_error"] < 3e-2 for one in found["comparisons"])
        alone = await verify(server.address, *fp8)
        assert (alone.code, alone.out) == (2, "")
        assert "--reply-dtype needs --model" in alone.err
    served = copy_of(small_model, tmp_path)
    rot(served, 2, MUTATIONS["gain 1.05"])
    async with running_server(served, range(16)) as server:
        outcome = await verify(server.address, "--model", small_model, *fp8)
        assert (outcome.code, outcome.wrong & {(2, DAMAGED)}) == (1, {(2, DAMAGED)})


async def test_weights_that_changed_in_memory_fail_by_the_servers_own_files(small_model: Path, verify: Verify) -> None:
    async with running_server(small_model, range(16)) as server:
        assert isinstance(server.backend, TorchBackend)
        server.backend._layers[1][1][3, 5, 7] *= -3
        outcome = await verify(server.address, "--json")
        assert (outcome.code, outcome.wrong) == (1, {(1, 3), (1, None)})


async def test_the_table_names_the_worst_expert_and_what_is_past_its_bound(
    small_model: Path, tmp_path: Path, verify: Verify
) -> None:
    served = copy_of(small_model, tmp_path)
    rot(served, 1, MUTATIONS["gain 1.05"])
    async with running_server(served, range(16)) as server:
        outcome = await verify(server.address, "--model", small_model)
        assert f"{server.address}: torch on cpu" in outcome.out
        assert "5.0e-02 (5)" in outcome.out
        assert "layer 1, expert 5: gain 1.05, must be within 1e-05 of 1" in outcome.out
        assert "worst expert: 5 of layer 1, relative error 5.00e-02" in outcome.out
        assert "FAILED: 1 of 32 experts past a bound" in outcome.out
        chosen = await verify(server.address, "--model", small_model, "--layers", "2", "--experts", "4-6", "--seed", 3)
        assert chosen.code == 0
        assert "OK: 0 of 3 experts past a bound" in chosen.out


async def test_every_family_can_be_verified(family: FamilyFolders, verify: Verify) -> None:
    async with (
        running_server(family.quantized, range(8)) as fp8,
        running_server(family.plain, range(8, 16)) as bf16,
    ):
        assert (await verify(fp8.address, "--model", family.quantized)).code == 0
        assert (await verify(bf16.address, "--model", family.plain)).code == 0


async def test_what_cannot_be_verified_says_why_and_exits_2(small_model: Path, tmp_path: Path, verify: Verify) -> None:
    other = copy_of(small_model, tmp_path)
    with Checkpoint(other) as checkpoint:
        gate = checkpoint.find("model.layers.1.mlp.gate.weight")
    with gate.file.open("r+b") as file:
        file.seek(gate.start)
        file.write(b"\1\2\3\4")
    async with running_server(small_model, range(16)) as server:
        cases: list[tuple[tuple[object, ...], str]] = [
            (("--model", other), "give --model the folder that the server was started with"),
            (("--model", tmp_path / "none"), "none/config.json does not exist"),
            (("--experts", "77"), f"{server.address} owns layers 1-2 and experts 0-15; none of them was asked for"),
            (("--tls-client-cert", "c"), "client_cert and client_key belong together"),
        ]
        for options, complaint in cases:
            outcome = await verify(server.address, *options)
            assert outcome.code == 2
            assert outcome.err.startswith("expertd verify: error: ")
            assert complaint in outcome.err


async def test_tls_and_tokens_protect_verification_too(small_model: Path, tmp_path: Path, verify: Verify) -> None:
    authority = Authority(tmp_path)
    certificate, key = authority.issue("server")
    tokens = tmp_path / "tokens"
    tokens.write_text("first-secret\n")
    wrong = tmp_path / "wrong"
    wrong.write_text("guess\n")
    security = {"tls_cert": certificate, "tls_key": key, "auth_token_file": tokens}
    async with running_server(small_model, range(2), **security) as server:
        trusted = (server.address, "--tls-ca", authority.pem, "--auth-token-file")
        for model in ((), ("--model", small_model)):
            assert (await verify(*trusted, tokens, *model)).code == 0
            refused = await verify(*trusted, wrong, *model)
            assert refused.code == 2
            assert "bearer token" in refused.err


@contextlib.asynccontextmanager
async def verification(server: Server, **fields: Any) -> Any:  # noqa: ANN401
    """The RPC with the generated classes."""
    async with open_channel(server) as channel:
        method: Any = channel.unary_stream(
            f"/{codec.SERVICE}/VerifyShard", codec.VerifyRequest.SerializeToString, codec.VerifyResponse.FromString
        )
        yield method(codec.VerifyRequest(**fields))


async def test_one_verification_at_a_time_and_a_cancelled_one_makes_room(small_model: Path) -> None:
    async with running_server(small_model, range(16)) as server:
        async with verification(server) as first:
            assert (await first.read()).expert == 0
            async with verification(server) as second:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await second.read()
            assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            first.cancel()
            while server.handlers._verifier._busy:
                await asyncio.sleep(0.01)
        async with verification(server, layers=[2], experts=[3]) as third:
            reports = [report async for report in third]
    assert [(report.layer, report.HasField("expert"), report.expert) for report in reports] == [
        *((2, True, 3), (2, False, 0))
    ]


async def test_strangers_are_refused(small_model: Path) -> None:
    async with running_server(small_model, range(4, 8)) as server:
        for fields, complaint in (
            ({"experts": [4, 3]}, "experts holds 3; this server owns experts 4-7"),
            ({"layers": [0]}, "layers holds 0; this server owns layers 1-2"),
        ):
            async with verification(server, **fields) as call:
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await call.read()
            assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.NOT_FOUND, complaint)


async def test_a_server_that_drains_ends_its_verification(small_model: Path) -> None:
    async with running_server(small_model, range(16)) as server, verification(server) as call:
        reports = aiter(call)
        await anext(reports)
        server.stop()
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            _ = [report async for report in reports]
        assert ended.value.code() == grpc.StatusCode.UNAVAILABLE


async def test_a_checkpoint_that_went_away_is_a_fault_of_the_server(small_model: Path, tmp_path: Path) -> None:
    served = copy_of(small_model, tmp_path)
    async with running_server(served, range(2)) as server:
        for file in served.glob("*.safetensors"):
            # The server holds it open, so that emptying it is what it sees.
            file.write_bytes(b"")
        async with verification(server) as call:
            with pytest.raises(grpc.aio.AioRpcError, match="the checkpoint can no longer be read") as ended:
                await call.read()
        assert ended.value.code() == grpc.StatusCode.INTERNAL
