"""Compiled kernels that cannot be kept: said once, at the start, with what to do."""

from pathlib import Path

import pytest

from expertd.kernels.cutile.run.cache import kernel_folder, warn_unless_kept


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
