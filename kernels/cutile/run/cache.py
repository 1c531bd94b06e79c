"""Where compiled kernels are kept from one start to the next."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from expertd.kernels.cutile.pipeline.toolchain import Toolchain

log = logging.getLogger(__name__)
OFF = ("", "0", "off", "none")


def kernel_folder() -> Path | None:
    """The folder of cuTile's cache, which the environment chooses; None where that turns it off."""
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    chosen = os.environ.get("CUDA_TILE_CACHE_DIR", str(Path(caches) / "cutile-python"))
    return None if chosen.strip().lower() in OFF else Path(chosen)


def warn_unless_kept() -> None:
    """cuTile says nothing when it cannot store what it compiled, and every start takes as long as the first one."""
    folder = kernel_folder()
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        log.warning(
            "compiled kernels cannot be kept in %s (%s): every start compiles them again; let user %d write there, or"
            " set CUDA_TILE_CACHE_DIR",
            folder,
            error.strerror,
            os.geteuid(),
        )


def log_toolchain() -> None:
    """Name the compiler, aloud where nobody has measured what it makes of the kernels."""
    toolchain = Toolchain.detect()
    if toolchain.measured:
        log.info("compiled by %s", toolchain)
    else:
        log.warning("%s", toolchain.advice)
