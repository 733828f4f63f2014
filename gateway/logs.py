"""JSON log lines on standard error: ids, never prompts or keys."""

import json
import logging
import re
import sys
from typing import Final

FIELDS: Final = ("request_id", "trace_id", "tenant_id", "adapter_id", "replica")
MESSAGE_LIMIT: Final = 4_096
TRACEBACK_LIMIT: Final = 16_384
_SAFE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/\[\]-]{0,255}")
UNSAFE: Final = "unsafe"
OWN: Final = "tailor"
"""What this project's loggers begin with."""


class JsonFormatter(logging.Formatter):
    """One object a line; `at` in Unix seconds; the ids that `ids` gave it; bounded whatever a message quotes."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:MESSAGE_LIMIT],
        }
        for field in FIELDS:
            value = getattr(record, field, None)
            if value is not None:
                line[field] = value if isinstance(value, str) and _SAFE.fullmatch(value) else UNSAFE
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)[-TRACEBACK_LIMIT:]  # the cause is at its end
        return json.dumps(line)


def ids(
    *, request_id: str = "", trace_id: str = "", tenant_id: str = "", adapter_id: str = "", replica: str = ""
) -> dict[str, str]:
    """The `extra` of a log line: what it is about. Values that do not look like ids are not written."""
    given = zip(FIELDS, (request_id, trace_id, tenant_id, adapter_id, replica), strict=True)
    return {field: value for field, value in given if value}


def set_up_logging(level: str) -> None:
    """Send every logger's lines to standard error as JSON; what others' loggers say for debugging is not written.

    A driver logs each statement with its parameters at DEBUG, an HTTP client each URL.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    root = logging.getLogger()
    logging.getLogger(OWN).setLevel(root.level)
    root.setLevel(max(root.level, logging.INFO))
