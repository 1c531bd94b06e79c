"""Options of `expertd serve`."""

import argparse
import contextlib
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from expertd.kernels.weights.checkpoint import Checkpoint
from expertd.server.assembly import assemble
from expertd.server.options.config import Address, InvalidOption, ServerConfig
from expertd.server.rpc.limits import check_largest_request
from expertd.server.telemetry.metrics import Metrics


def parse(*arguments: str) -> ServerConfig:
    parser = argparse.ArgumentParser()
    ServerConfig.add_arguments(parser)
    return ServerConfig.from_arguments(parser.parse_args(["--model", "m", "--experts", "0-31", *arguments]))


def of_model(model: Path, *arguments: str) -> ServerConfig:
    parser = argparse.ArgumentParser()
    ServerConfig.add_arguments(parser)
    return ServerConfig.from_arguments(parser.parse_args(["--model", str(model), *arguments]))


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "3-1", "0-99999999", "1,,2", "1.5"])
def test_bad_ranges_are_refused_with_the_option_and_the_text(text: str) -> None:
    with pytest.raises(InvalidOption, match=r"^--layers: "):
        parse(f"--layers={text}")


@pytest.mark.parametrize("text", ["0.0.0.0:50051", "[::1]:1", "example.org:0"])
def test_addresses_survive_printing(text: str) -> None:
    assert str(Address.parse(text)) == text


@pytest.mark.parametrize("text", ["", "host", "host:", ":1", "host:99999", "host:x"])
def test_bad_addresses_are_refused(text: str) -> None:
    with pytest.raises(InvalidOption, match=r"^--listen: .* is not host:port"):
        parse(f"--listen={text}")


def test_defaults_listen_on_loopback_only() -> None:
    config = parse()
    assert (config.listen.host, config.metrics.host) == ("127.0.0.1", "127.0.0.1")
    assert (config.model, config.experts, config.layers) == (Path("m"), tuple(range(32)), None)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--backend", "tpu"], "--backend is 'tpu'; choose from auto, torch, cutile"),
        (["--log-level", "loud"], "--log-level is 'loud'"),
        (["--log-format", "xml"], "--log-format is 'xml'; choose from text, json"),
        (["--threads", "0"], "--threads is 0; it must be greater than 0"),
        (["--threads", "two"], "--threads: invalid literal"),
        (["--drain-seconds", "-1"], r"--drain-seconds is -1\.0; it must be greater than 0"),
        (["--max-tokens-per-request", "0"], "--max-tokens-per-request is 0"),
        (["--max-batch-tokens", "100"], "--max-batch-tokens is 100; it must be at least --max-tokens-per-request 4096"),
        (["--shadow-check-rate", "1.5"], r"--shadow-check-rate is 1\.5; it must be from 0 to 1"),
        (["--shadow-check-rate", "nan"], "--shadow-check-rate is nan; it must be from 0 to 1"),
        (["--max-queued-tokens", "100"], "--max-queued-tokens is 100; it must be at least"),
        (["--max-queued-tokens", str(2**31)], "--max-queued-tokens is 2147483648; it must be at most 2147483647"),
        (["--max-queued-bytes", str(2**63)], "--max-queued-bytes is 9223372036854775808; it must be at most"),
    ],
)
def test_values_that_cannot_work_are_refused_with_option_and_bound(arguments: list[str], complaint: str) -> None:
    with pytest.raises(InvalidOption, match=complaint):
        parse(*arguments)


@pytest.mark.parametrize(
    ("given", "experts"),
    [
        (("--experts", "all"), range(16)),
        (("--shard", "2/8"), range(2, 4)),
        (("--shard", "1/3"), range(5)),
        (("--shard", "3/3"), range(10, 16)),
    ],
)
def test_the_model_tells_which_experts_there_are(small_model: Path, given: tuple[str, ...], experts: range) -> None:
    assert of_model(small_model, *given).experts == tuple(experts)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "--experts or --shard is needed, one of them"),
        (("--experts", "0", "--shard", "1/2"), "--experts or --shard is needed, one of them"),
        (("--shard", "0/8"), "--shard: '0/8' is not a shard such as 2/8"),
        (("--shard", "1/17"), "--shard 1/17: the model has 16 experts"),
    ],
)
def test_unusable_shards_are_named(small_model: Path, given: tuple[str, ...], said: str) -> None:
    with pytest.raises(InvalidOption, match=said):
        of_model(small_model, *given)


LARGEST = (2**31 - 1 - 64 * 1024) // (4 * 256)
"""Tokens of which the FP32 sums fit into a message."""
ROW = 2 * 256 + 8 * 4
"""Bytes of a token in BF16."""


@pytest.mark.parametrize(
    ("tokens", "queued_bytes", "complaint"),
    [
        (
            LARGEST + 1,
            LARGEST * ROW,
            "--max-tokens-per-request is 2097088: with the model's hidden size of 256 messages",
        ),
        (
            LARGEST,
            LARGEST * ROW - 1,
            "--max-queued-bytes is 1140815327; it must be at least 1140815328, what a request",
        ),
        (LARGEST, LARGEST * ROW, None),
    ],
)
def test_the_largest_request_has_room(small_model: Path, tokens: int, queued_bytes: int, complaint: str | None) -> None:
    of_tokens = [
        text
        for name in ("max-tokens-per-request", "max-batch-tokens", "max-queued-tokens")
        for text in (f"--{name}", str(tokens))
    ]
    config = of_model(small_model, "--experts", "0", *of_tokens, "--max-queued-bytes", str(queued_bytes))
    with pytest.raises(InvalidOption, match=complaint) if complaint else contextlib.nullcontext():
        check_largest_request(config, Checkpoint(small_model).config)


def test_a_server_whose_largest_request_has_no_room_is_not_begun(small_model: Path) -> None:
    config = of_model(small_model, "--experts", "0", "--max-queued-bytes", "1000")
    with pytest.raises(InvalidOption, match=r"--max-queued-bytes is 1000; .* --max-tokens-per-request 4096"):
        assemble(config, Metrics(CollectorRegistry()))
