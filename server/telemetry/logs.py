"""The log: lines for people, or one JSON object a line for machines."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

from expertd.server.telemetry.log_writer import LogWriter

_KNOWN = {*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"}


def configure_logging(level: str, log_format: str) -> LogWriter:
    """Write the log of this process to standard error."""
    writer = LogWriter()
    writer.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(level=level.upper(), handlers=[writer])
    return writer


class TextFormatter(logging.Formatter):
    """The message, followed by the record's own fields as name=value."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        fields = (f" {name}={value}" for name, value in _fields(record).items())
        return super().formatMessage(record) + "".join(fields)


class JsonFormatter(logging.Formatter):
    """time (RFC 3339), level, logger, message, the record's own fields, and exception with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def _fields(record: logging.LogRecord) -> dict[str, object]:
    """What was given as `extra`."""
    return {name: value for name, value in record.__dict__.items() if name not in _KNOWN}
