"""How a chart is drawn and kept: once in colours that the page decides (SVG), once as a picture (PNG).

Needs the extra `loadtest` (matplotlib).
"""

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.figure import Figure

Colours = Mapping[str, str]
LIGHT: Final[Colours] = {
    "surface": "#ffffff",
    "ink": "#1c2126",
    "muted": "#667079",
    "grid": "#e3e7ea",
    "blue": "#1a6fb8",
    "orange": "#b84f14",
    "green": "#17805a",
    "purple": "#7b4bb3",
    "red": "#c02639",
}
DARK: Final[Colours] = {
    "surface": "#15191d",
    "ink": "#e6eaed",
    "muted": "#98a3ac",
    "grid": "#2b3238",
    "blue": "#62aef0",
    "orange": "#f0945a",
    "green": "#45c08a",
    "purple": "#b596ee",
    "red": "#ff6f7d",
}
_MARKED: Final[Colours] = {name: f"#0d0e{number:02x}" for number, name in enumerate(LIGHT, 0xA0)}
"""Colours that nothing else has; in the SVG each becomes the page's variable of that name."""
_STYLE: Final[Mapping[str, Any]] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "tailor",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.constrained_layout.use": True,
    "axes.unicode_minus": False,
}
_WIDTH: Final = 11.4
"""Inches; as wide as the page, its letters are as large as the page's."""
SERIES: Final = ("blue", "orange", "green", "purple", "red")


@dataclass(frozen=True, slots=True)
class Chart:
    """A chart of a run: a title that says what is drawn, and a note that says how it is read."""

    name: str
    title: str
    note: str
    draw: Callable[[Figure, Colours], None]
    height: float = 3.0


@dataclass(frozen=True, slots=True)
class Absent:
    """A chart that this run has nothing for, and why."""

    title: str
    reason: str


def svg(chart: Chart) -> str:
    """As an element for a page; its colours are the page's `--ink`, `--blue`, …"""
    written = io.StringIO()
    with _figure(chart, _MARKED) as figure:
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    text = text[text.index("<svg") :]
    for name, colour in _MARKED.items():
        text = text.replace(colour, f"var(--{name})")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text))
    return re.sub(r' id="(?!m|p|C|D)[^"]*"', "", text)


def png(chart: Chart, path: Path) -> None:
    """As a picture, on white, with its title: it goes where no page says what it is."""
    with _figure(chart, LIGHT) as figure:
        figure.suptitle(chart.title, x=0.005, ha="left", fontsize=11, fontweight="bold")
        figure.savefig(path, format="png", dpi=150, facecolor=LIGHT["surface"])


@contextmanager
def _figure(chart: Chart, colours: Colours) -> Iterator[Figure]:
    inks = {
        "text.color": colours["ink"],
        "axes.labelcolor": colours["ink"],
        "axes.edgecolor": colours["muted"],
        "xtick.color": colours["muted"],
        "ytick.color": colours["muted"],
        "xtick.labelcolor": colours["ink"],
        "ytick.labelcolor": colours["ink"],
        "grid.color": colours["grid"],
        "axes.facecolor": "none",
        "legend.labelcolor": colours["ink"],
    }
    with matplotlib.rc_context({**_STYLE, **inks}):
        figure = Figure(figsize=(_WIDTH, chart.height))
        chart.draw(figure, colours)
        yield figure
