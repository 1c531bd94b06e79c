"""Options of `expertd serve`."""

import argparse
from pathlib import Path

import pytest

from expertd.server.options.config import Address, InvalidOption, ServerConfig


def parse(*arguments: str) -> ServerConfig:
    parser = argparse.ArgumentParser()
    ServerConfig.add_arguments(parser)
    return ServerConfig.from_arguments(parser.parse_args(["--model", "m", "--experts", "0-31", *arguments]))


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
        (["--front-ends", "-1"], "--front-ends is -1; it must be at least 0"),
        (["--front-ends", "2", "--shared-memory-bytes", "0"], "--front-ends needs --shared-memory-bytes; it is 0"),
        (["--max-queued-tokens", "100"], "--max-queued-tokens is 100; it must be at least"),
    ],
)
def test_values_that_cannot_work_are_refused_with_option_and_bound(arguments: list[str], complaint: str) -> None:
    with pytest.raises(InvalidOption, match=complaint):
        parse(*arguments)
