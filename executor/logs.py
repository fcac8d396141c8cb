"""Logs of every command: lines for people, or one JSON object per line for machines.

A JSON line has `time` (UTC, RFC 3339), `level`, `logger`, `message`, the fields that the command
gives every line (its node's name, say), those of the call (`extra={...}`), and `exception` where
one was logged.
"""

from __future__ import annotations

import argparse
import datetime
import json
import logging
import math
import sys
from collections.abc import Mapping
from typing import Any

__all__ = ["JsonFormatter", "add_log_arguments", "configure_logging"]

_TEXT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_LEVELS = ("debug", "info", "warning", "error")
# What every record has; anything else came with `extra`.
_STANDARD = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def __init__(self, fields: Mapping[str, Any] | None = None) -> None:
        """Add `fields` to every line."""
        super().__init__()
        self._fields = dict(fields or {})

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        line: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        extra = {k: v for k, v in record.__dict__.items() if k not in _STANDARD}
        # The four above keep their meaning, whatever a call names its fields.
        line = {**self._fields, **extra, **line}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(_plain(line), ensure_ascii=False)


def add_log_arguments(parser: argparse.ArgumentParser, level: str = "warning") -> None:
    """Add `--log-format` and `--log-level` to a command; `level` is its default."""
    parser.add_argument(
        "--log-format", choices=("text", "json"), default="text", help="form of log lines (stderr)"
    )
    parser.add_argument("--log-level", choices=_LEVELS, default=level, help=f"default: {level}")


def configure_logging(args: argparse.Namespace, **fields: Any) -> None:
    """Log to stderr as the command line says.

    Args:
        args: What a parser with `add_log_arguments` read.
        fields: Added to every JSON line, e.g. `node="fog"`.
    """
    handler = logging.StreamHandler(sys.stderr)
    if args.log_format == "json":
        handler.setFormatter(JsonFormatter(fields))
        logging.captureWarnings(True)
    else:
        handler.setFormatter(logging.Formatter(_TEXT))
    logging.basicConfig(level=args.log_level.upper(), handlers=[handler])


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers that are not finite, and objects, become text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v) for v in value]
    return str(value)
