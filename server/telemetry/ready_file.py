"""A file that is there while a server serves, for supervisors without gRPC: JSON with its addresses."""

from __future__ import annotations

import logging
from pathlib import Path

from expertd.kernels.weights.files import write_json, write_text
from expertd.server.options.config import InvalidOption

log = logging.getLogger(__name__)


class ReadyFile:
    """Means nothing but that: one that a crash left behind goes before anything else is done."""

    def __init__(self, path: Path | None) -> None:
        """Raises `InvalidOption` for a path where none can be written, before weights are loaded for nothing."""
        self._path = path
        self.addresses: dict[str, str] = {}
        if path is None:
            return
        # Beside it: the file itself would say that the server is ready.
        beside = path.with_name(f".{path.name}.try")
        try:
            path.unlink(missing_ok=True)
            write_text("", beside)
            beside.unlink()
        except OSError as error:
            raise InvalidOption(f"--ready-file {path} cannot be written: {error.strerror}") from None

    def tell(self, serving: bool) -> None:
        if self._path is None:
            return
        try:
            if serving:
                write_json(self.addresses, self._path)
            else:
                self._path.unlink(missing_ok=True)
        except OSError:
            log.exception("--ready-file %s cannot be kept true", self._path)
