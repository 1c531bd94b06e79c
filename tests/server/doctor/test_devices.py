"""What `expertd doctor` says of several devices."""

from pathlib import Path

import pytest

from expertd.server.doctor.gpu import check_devices, devices_of
from expertd.server.options.config import ServerConfig


def config(devices: tuple[int, ...] | None) -> ServerConfig:
    return ServerConfig(model=Path("m"), experts=(0, 1), devices=devices)


def test_all_devices_are_those_that_are_there() -> None:
    assert devices_of(config(()), 3) == (0, 1, 2)
    assert devices_of(config((0, 2, 5)), 3) == (0, 2)


@pytest.mark.parametrize(
    ("devices", "apart", "level", "text"),
    [
        ((0, 1), (), "ok", "2 GPUs, each of which reaches the memory of the others: they add up their sums"),
        ((0, 1, 2), ((1, 2),), "warn", "GPU 1 does not reach the memory of GPU 2: sums are added up on the host"),
        (tuple(range(9)), (), "warn", "9 GPUs: sums of more than 8 are added up on the host"),
        ((), (), "fail", "--devices names none of the 3 GPUs that torch sees"),
    ],
)
def test_how_sums_are_added_is_told(
    devices: tuple[int, ...], apart: tuple[tuple[int, int], ...], level: str, text: str
) -> None:
    finding = check_devices(devices, 3, lambda one, other: (one, other) not in apart)
    assert (finding.level, finding.check) == (level, "devices")
    assert finding.text.startswith(text)
