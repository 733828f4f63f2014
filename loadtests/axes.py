"""Axes that people read: logarithmic where what is drawn spans enough, plain numbers, the legend beside them."""

import math
from typing import Any, Final

from matplotlib.ticker import FuncFormatter

_WIDE: Final = 12.0


def log_axis(axis: Any) -> None:
    """Make an axis (`axes.xaxis`, `axes.yaxis`) logarithmic if its values span decades, else let it begin at 0.

    Call it after its lines were drawn.
    """
    is_x = axis.axis_name == "x"
    low, high = axis.get_data_interval()
    if not math.isfinite(axis.get_minpos()) or not math.isfinite(high) or high < max(low, axis.get_minpos()) * _WIDE:
        (axis.axes.set_xlim if is_x else axis.axes.set_ylim)(0, None)
        return
    (axis.axes.set_xscale if is_x else axis.axes.set_yscale)("log")
    low, high = axis.get_view_interval()
    between = (2, 5) if high < low * 100 else ()
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:,g}" if _leading(value) in between else ""))


def _leading(value: float) -> int:
    power: float = 10 ** math.floor(math.log10(value) + 1e-9)
    return round(value / power)


def brief(value: float) -> str:
    """A time in ms in three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def beside(axes: Any) -> None:
    """Put the legend where it covers nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.02))
