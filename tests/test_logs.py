"""Log lines as JSON."""

from __future__ import annotations

import datetime
import json
import logging
import sys

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from executor.logs import JsonFormatter

FIXED = {"message", "level", "logger", "time", "exception"}


def record(message: str, *args: object, **extra: object) -> logging.LogRecord:
    logger = logging.getLogger("executor.test")
    return logger.makeRecord(logger.name, logging.WARNING, "f", 1, message, args, None, extra=extra)


def test_a_line_has_time_level_logger_message_and_fields() -> None:
    made = record("queue of %s is full", "fog", queue_len=64, ratio=np.float64(0.5), nan=np.nan)
    line = json.loads(JsonFormatter({"node": "fog"}).format(made))
    when = datetime.datetime.fromisoformat(line.pop("time").replace("Z", "+00:00"))
    assert abs(when.timestamp() - made.created) < 0.001 and when.utcoffset() == datetime.timedelta()
    assert line == {
        "node": "fog", "level": "warning", "logger": "executor.test",
        "message": "queue of fog is full", "queue_len": 64, "ratio": 0.5, "nan": "nan",
    }  # fmt: skip


def test_an_exception_stays_in_its_line() -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        made = record("failed")
        made.exc_info = sys.exc_info()
    text = JsonFormatter().format(made)
    assert "\n" not in text and "ValueError: two" in json.loads(text)["exception"]


@given(st.text(), st.dictionaries(st.text(min_size=1), st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)))  # fmt: skip
def test_anything_makes_one_parsable_line(message: str, fields: dict[str, object]) -> None:
    made = record("%s", message)
    standard = set(made.__dict__) | FIXED
    made.__dict__.update({k: v for k, v in fields.items() if k not in standard})
    text = JsonFormatter(fields).format(made)
    assert "\n" not in text
    line = json.loads(text, parse_constant=lambda name: 1 / 0)
    assert line["message"] == message and line["level"] == "warning"
    assert set(line) >= {k for k in fields if k not in standard}
