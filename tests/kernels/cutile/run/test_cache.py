"""What a start says of compiled kernels: that they cannot be kept, and who compiles them, with what to do."""

import logging
from pathlib import Path

import pytest

from expertd.kernels.cutile.pipeline.toolchain import Toolchain, measured_toolchains
from expertd.kernels.cutile.run.cache import kernel_folder, log_toolchain, warn_unless_kept


def test_a_folder_that_can_be_written_is_made_and_nothing_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("CUDA_TILE_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    warn_unless_kept()
    assert kernel_folder() == tmp_path / "caches" / "cutile-python"
    assert list((tmp_path / "caches" / "cutile-python").iterdir()) == []
    assert caplog.text == ""


def test_a_folder_that_cannot_be_written_is_named_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CUDA_TILE_CACHE_DIR", str(tmp_path / "file" / "kernels"))
    warn_unless_kept()
    assert f"compiled kernels cannot be kept in {tmp_path}/file/kernels (Not a directory)" in caplog.text


def test_a_cache_that_is_off_is_nobodys_mistake(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_TILE_CACHE_DIR", "off")
    warn_unless_kept()
    assert kernel_folder() is None
    assert caplog.text == ""


@pytest.mark.parametrize("toolchain", measured_toolchains(), ids=str)
def test_a_compiler_that_was_measured_is_named(
    toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Toolchain, "detect", lambda: toolchain)
    caplog.set_level(logging.INFO)
    log_toolchain()
    assert [(one.levelname, one.getMessage()) for one in caplog.records] == [("INFO", f"compiled by {toolchain}")]


@pytest.mark.parametrize("toolchain", [Toolchain("1.7.0", "13.5.1"), Toolchain("1.8.0", "13.4.92")], ids=str)
def test_a_compiler_that_was_not_measured_is_a_warning_with_what_to_do(
    toolchain: Toolchain, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Toolchain, "detect", lambda: toolchain)
    log_toolchain()
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        f"{toolchain} was not measured with these kernels, and may be slower: install cuda-tile 1.7.0 with tileiras"
        " 13.4.92, or run 'expertd tune'"
    )
