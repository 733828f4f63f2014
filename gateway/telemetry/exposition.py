"""Prometheus' text format, version 0.0.4, written straight.

`prometheus_client` would hold the event loop for 67 ms on the 6,700 lines of a full page, and nobody's tokens would
move; this takes 12, in slices of one (docs/telemetry.md). Its parser reads the page in the tests.
"""

from collections.abc import Sequence
from typing import Final

from gateway.telemetry.names import Metric

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPES: Final = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def head(metric: Metric) -> str:
    """The two lines before a family's samples."""
    return f"# HELP {metric.name} {metric.help}\n# TYPE {metric.name} {metric.kind}\n"


def labelled(names: Sequence[str], values: Sequence[str]) -> str:
    """`a="x",b="y"`, values escaped."""
    return ",".join([f'{name}="{value.translate(_ESCAPES)}"' for name, value in zip(names, values, strict=True)])


def sample(name: str, labels: str, value: float) -> str:
    """One line; `labels` as `labelled` writes them, or empty."""
    return f"{name}{{{labels}}} {value}\n" if labels else f"{name} {value}\n"
