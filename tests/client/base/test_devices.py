"""The GPU that a caller means is that of its own thread."""

import pytest
import torch

from expertd.client.base.devices import as_device, on_device


def test_a_gpu_without_a_number_is_this_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert as_device(None) == as_device("cuda") == torch.device("cuda", 3)
    assert as_device("cuda:1") == torch.device("cuda", 1)
    assert as_device("cpu") == torch.device("cpu")


def test_nothing_is_done_for_a_cpu() -> None:
    with on_device(torch.device("cpu")):
        assert torch.zeros(1).device.type == "cpu"
