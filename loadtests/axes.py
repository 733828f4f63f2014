"""Logarithmic axes that people read: plain numbers, and some between the powers of ten where there is room."""

import math
from typing import Any

from matplotlib.ticker import FuncFormatter


def log_axis(axis: Any) -> None:
    """Make an axis (`axes.xaxis`, `axes.yaxis`) logarithmic; after its lines were drawn."""
    if not math.isfinite(axis.get_minpos()):
        return  # nothing positive is drawn
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    between = (2, 3, 5) if high < low * 8 else (2, 5) if high < low * 60 else ()
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}" if _leading(value) in between else ""))


def _leading(value: float) -> int:
    power: float = 10 ** math.floor(math.log10(value) + 1e-9)
    return round(value / power)
