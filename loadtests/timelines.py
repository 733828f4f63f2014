"""The charts along a run's time: load and waiting with what was done meanwhile, the slots, tenants, tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
from matplotlib.collections import PatchCollection
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from loadtests import metrics, statistics
from loadtests.asking import groups_met, tenants_met
from loadtests.axes import beside, brief, log_axis
from loadtests.charts import SERIES, Absent, Chart, Colours
from loadtests.recording import ABSENT, TIERS, Array, Outcome, Run
from loadtests.selection import MS, S, Selected

_BINS: Final = 120
_TENANTS: Final = 32  # rows of the heat map
_COLUMNS: Final = 60
_LEAST_MS: Final = 1.0
"""Pieces that came with one read have no time between them, and a logarithm no zero."""


@dataclass(frozen=True, slots=True)
class Bins:
    """Equal stretches of a run's time."""

    width_s: float
    count: int

    def places(self, times: Array) -> Array:
        """In which each time (ns) lies; the last takes what is later."""
        return np.clip((times / S / self.width_s).astype(int), 0, self.count - 1)

    @property
    def middles(self) -> Array:
        """In seconds."""
        return (np.arange(self.count) + 0.5) * self.width_s

    @property
    def edges(self) -> Array:
        """In seconds, one more than there are stretches."""
        return np.arange(self.count + 1) * self.width_s


def bins_of(run: Run, most: int = _BINS) -> Bins:
    """Of a round width, so that there are `most` at most, and six requests in each in the mean."""
    end = max(run.schedule.end, int(run.samples.rows["done"].max(initial=0))) / S
    least = max(end / most, 6 * end / max(1, len(run.samples.rows)))
    steps = (0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 1_800, 3_600)
    width = next((step for step in steps if step >= least), least)
    return Bins(width, max(1, math.ceil(end / width)))


def timeline(run: Run) -> Chart | Absent:
    """Load, failures and waiting over the run, with what was done to the server."""
    title = "The run over time"
    chosen, bins = _everything(run), bins_of(run)
    if not len(chosen.at):
        return Absent(title, "nothing was sent")
    lanes = list(dict.fromkeys(one.kind for one in run.events))
    groups = groups_met(run)
    groups = groups if len(groups) <= len(SERIES) else []  # more lines than can be told apart

    def draw(figure: Figure, colours: Colours) -> None:
        ratios = [*([0.16 * len(lanes) + 0.12] if lanes else []), 1, 1, *([1] if groups else [])]
        panels = figure.subplots(len(ratios), sharex=True, height_ratios=ratios)
        under = panels[1:] if lanes else panels
        _rates(under[0], chosen, bins, colours)
        _times(under[1], chosen, bins, colours)
        if groups:
            _groups(under[2], chosen, bins, groups, colours)
        if lanes:
            _lanes(panels[0], run, lanes, colours)
            _flags(under, run, colours)
        _phases(panels, run, colours)
        last = max([bins.width_s * bins.count, *(one.at / S for one in run.events)])
        under[0].set(xlim=(-0.01 * last, 1.01 * last))
        under[-1].set(xlabel="seconds since the begin")
        for axes in under:
            beside(axes)

    note = (
        f"In stretches of {bins.width_s:g} s. Requests are offered when they were scheduled, whole, refused or failed "
        "when they ended. Times are drawn at when their requests were scheduled; response time runs from then, service "
        "time from when they were sent."
    )
    note += " The lowest panel has each group's time to first token, a band from the median to p99." if groups else ""
    note += " A cross in a lane is an action that failed." if any(one.error for one in run.events) else ""
    return Chart("timeline", title, note, draw, height=3.7 + 0.2 * len(lanes) + (1.5 if groups else 0))


def _rates(axes: Any, chosen: Selected, bins: Bins, colours: Colours) -> None:
    rows = chosen.rows

    def rate(times: Array) -> Array:
        return np.bincount(bins.places(times), minlength=bins.count) / bins.width_s

    axes.stairs(rate(rows["scheduled"]), bins.edges, fill=True, color=colours["muted"], alpha=0.25, label="offered")
    for which, name, colour in (
        (chosen.whole, "whole", "blue"),
        (_refused(chosen), "refused", "orange"),
        (chosen.failed, "failed", "red"),
    ):
        if which.any():
            ended = np.maximum(rows["done"][which], rows["scheduled"][which])
            axes.stairs(rate(ended), bins.edges, baseline=None, color=colours[colour], linewidth=1.6, label=name)
    axes.set(ylabel="requests/s", ylim=(0, None))


def _times(axes: Any, chosen: Selected, bins: Bins, colours: Colours) -> None:
    whole = chosen.rows[chosen.whole]
    for begin, share, name, colour in (
        ("scheduled", 0.5, "response p50", "blue"),
        ("scheduled", 0.99, "response p99", "orange"),
        ("sent", 0.99, "service p99", "green"),
    ):
        values = _by_bin(bins, whole["scheduled"], (whole["done"] - whole[begin]) / MS, share)
        style = "--" if begin == "sent" else "-"
        axes.plot(bins.middles, values, color=colours[colour], label=name, linestyle=style, marker=".", markersize=3)
    log_axis(axes.yaxis)
    axes.set(ylabel="response, ms")


def _groups(axes: Any, chosen: Selected, bins: Bins, groups: Sequence[str], colours: Colours) -> None:
    """What each group of tenants waits for its first token."""
    of_group = np.array(chosen.run.schedule.groups)[chosen.planned["tenant"]]
    for group, colour in zip(groups, SERIES, strict=False):
        rows = chosen.rows[chosen.whole & (chosen.rows["first"] != ABSENT) & (of_group == group)]
        waits = (rows["first"] - rows["scheduled"]) / MS
        median, most = (_by_bin(bins, rows["scheduled"], waits, share) for share in (0.5, 0.99))
        axes.plot(bins.middles, median, color=colours[colour], marker=".", markersize=3, label=group)
        axes.fill_between(bins.middles, median, most, color=colours[colour], alpha=0.18, linewidth=0)
    log_axis(axes.yaxis)
    axes.set(ylabel="first token, ms")


def hit_ratio(run: Run) -> Chart | Absent:
    """The slot hit ratio over the run, with what is predicted."""
    title = "Slot hit ratio"
    chosen, bins = _everything(run), bins_of(run, 60)
    tier = chosen.rows["tier"]
    of_adapters = np.isin(tier, [TIERS.index(one) for one in ("gpu", "host", "cold")])
    if not of_adapters.any():
        return Absent(title, "the server did not tell where adapters were")
    place = bins.places(chosen.rows["scheduled"])
    asked = np.bincount(place[of_adapters], minlength=bins.count)
    hits = np.bincount(place[tier == TIERS.index("gpu")], minlength=bins.count)

    def draw(figure: Figure, colours: Colours) -> None:
        axes = figure.subplots()
        share = np.where(asked > 0, hits / np.maximum(asked, 1), np.nan)
        axes.plot(bins.middles, share, color=colours["blue"], marker=".", markersize=3, label="measured")
        for number, (begin, end) in enumerate(run.schedule.phases):
            of_phase = Selected(run, chosen.at[chosen.planned["phase"] == number])
            for name, label, colour, style in (
                ("hit_ratio.predicted", "predicted (Che)", "orange", "--"),
                ("hit_ratio.lru", "LRU on these very requests", "green", ":"),
            ):
                value = metrics.of(of_phase, name).value if len(of_phase.at) else math.nan
                if not math.isnan(value):
                    span = [begin / S, end / S]
                    known = axes.get_legend_handles_labels()[1]
                    axes.plot(span, [value] * 2, style, color=colours[colour], label=None if label in known else label)
        _phases([axes], run, colours)
        axes.set(ylabel="share of hits", xlabel="seconds since the begin", ylim=(0, 1.05))
        beside(axes)

    note = (
        "Of the requests to adapters, those whose adapter was in a slot. Che's approximation supposes independent "
        "requests and a cache that has been full for long; the other line is a cache of as many slots, empty at first."
    )
    return Chart("hit-ratio", title, note, draw)


def heat_map(run: Run) -> Chart | Absent:
    """How long each tenant waited, over the run."""
    title = "Tenants over time"
    chosen, bins = _everything(run), bins_of(run, _COLUMNS)
    tenants, counts = np.unique(chosen.planned["tenant"], return_counts=True)
    if len(tenants) < 2:
        return Absent(title, "only one tenant asked")
    if not tenants_met(chosen):
        return Absent(title, "no two tenants asked in one phase")
    shown = np.sort(tenants[np.argsort(-counts, kind="stable")[:_TENANTS]])
    waits = np.array([_waits(chosen, bins, int(tenant)) for tenant in shown])
    if np.isnan(waits).all():
        return Absent(title, "no answer came whole")
    low, high = float(np.nanmin(waits)), float(np.nanmax(waits))

    def draw(figure: Figure, colours: Colours) -> None:
        axes, scale = figure.subplots(1, 2, width_ratios=[40, 1])
        depths = _depth(waits, low, high)
        cells = [(row, column) for row, column in np.argwhere(~np.isnan(waits))]
        squares = [Rectangle((column * bins.width_s, row - 0.46), bins.width_s, 0.92) for row, column in cells]
        shades = [float(depths[row, column]) for row, column in cells]
        axes.add_collection(_shaded(squares, shades, colours))
        for row, tenant in enumerate(shown):
            bad = chosen.rows[(chosen.planned["tenant"] == tenant) & (chosen.failed | _refused(chosen))]
            axes.plot(bad["scheduled"] / S, np.full(len(bad), row), "x", markersize=3, color=colours["red"])
        _flags([axes], run, colours)
        _phases([axes], run, colours)
        last = run.schedule.end / S
        axes.set(
            xlim=(0, bins.width_s * math.ceil(last / bins.width_s)),
            ylim=(len(shown) - 0.5, -0.5),
            xlabel="seconds since the begin",
        )
        axes.set_yticks(range(len(shown)), [run.schedule.tenants[tenant] for tenant in shown], fontsize=8)
        axes.grid(visible=False)
        _scale(scale, low, high, colours)

    rest = len(tenants) - len(shown)
    note = "The deeper, the longer the longest response in that stretch. A cross failed or was refused."
    note += f" {rest} tenants with fewer requests are not shown." if rest else ""
    return Chart("tenants-time", title, note, draw, height=1.3 + 0.2 * max(4, len(shown)))


def token_gaps(run: Run) -> Chart | Absent:
    """The time between tokens over the run, with the loads of adapters marked."""
    title = "Time between tokens and adapters' loads"
    chosen, bins = _everything(run), bins_of(run)
    when, gaps = metrics.gaps(chosen)
    if not len(gaps):
        return Absent(title, "no answer had more than one piece")
    loading = chosen.rows[np.isin(chosen.rows["tier"], [TIERS.index("host"), TIERS.index("cold")])]
    loads = np.unique((loading["sent"] / S / (bins.width_s / 4)).astype(int)) * bins.width_s / 4

    def draw(figure: Figure, colours: Colours) -> None:
        axes = figure.subplots()
        for share, colour in ((0.5, "blue"), (0.99, "orange")):
            values = np.maximum(_by_bin(bins, when, gaps, share), _LEAST_MS)
            axes.plot(bins.middles, values, color=colours[colour], marker=".", markersize=3, label=f"p{share * 100:g}")
        log_axis(axes.yaxis)
        if len(loads):
            to_bottom = axes.get_xaxis_transform()
            axes.plot(loads, np.full(len(loads), 0.03), "|", transform=to_bottom, color=colours["red"], label="a load")
        _flags([axes], run, colours)
        _phases([axes], run, colours)
        axes.set(ylabel="ms between chunks", xlabel="seconds since the begin, by when a chunk came")
        beside(axes)

    note = "No request waited for an adapter's load."
    if len(loads):
        note = f"{len(loading):,} requests waited for an adapter's load; a mark below is when such a one was sent."
    if (gaps < _LEAST_MS).any():
        note += f" Chunks that came at once have no time between them, and are drawn at {_LEAST_MS:g} ms."
    return Chart("token-gaps", title, note, draw)


def _everything(run: Run) -> Selected:
    return Selected(run, np.flatnonzero(run.samples.rows["scheduled"] != ABSENT))


def _refused(chosen: Selected) -> Array:
    return np.asarray(chosen.rows["outcome"] == Outcome.REFUSED)


def _by_bin(bins: Bins, when: Array, values: Array, share: float) -> Array:
    """The percentile in each stretch; nan where there is none."""
    place = bins.places(when)
    order = np.argsort(place, kind="stable")
    edges = np.searchsorted(place[order], np.arange(bins.count + 1))
    parts = [values[order[low:high]] for low, high in pairwise(edges)]
    return np.array([statistics.percentile(part, share) for part in parts])


def _waits(chosen: Selected, bins: Bins, tenant: int) -> Array:
    rows = chosen.rows[chosen.whole & (chosen.planned["tenant"] == tenant)]
    return _by_bin(bins, rows["scheduled"], (rows["done"] - rows["scheduled"]) / MS, 1.0)


def _depth(values: Array, low: float, high: float) -> Array:
    """From 0.08 to 1, as the logarithm goes."""
    if high <= low:
        return np.full(np.shape(values), 0.3)
    return 0.08 + 0.92 * np.log(np.maximum(values, low) / low) / math.log(high / low)


def _shaded(squares: Sequence[Rectangle], shades: Sequence[float], colours: Colours) -> PatchCollection:
    """One colour, the deeper the more opaque, so that it reads on light and dark."""
    shaded = PatchCollection(squares, linewidths=0)
    shaded.set_facecolor([to_rgba(colours["blue"], round(shade, 2)) for shade in shades])
    return shaded


def _scale(axes: Any, low: float, high: float, colours: Colours) -> None:
    steps = np.geomspace(max(low, 1e-3), max(high, low * 1.001, 1e-3), 12)
    squares = [Rectangle((0, number), 1, 1) for number in range(len(steps))]
    axes.add_collection(_shaded(squares, _depth(steps, low, high).tolist(), colours))
    axes.set(xlim=(0, 1), ylim=(0, len(steps)), xticks=[])
    axes.set_yticks([0.5, 6, 11.5], [brief(value) for value in (low, math.sqrt(low * high), high)], fontsize=8)
    axes.yaxis.tick_right()
    axes.set_title("ms", fontsize=8)
    axes.grid(visible=False)


def _lanes(axes: Any, run: Run, lanes: Sequence[str], colours: Colours) -> None:
    for one in run.events:
        colour, marker = (colours["red"], "x") if one.error else (colours["purple"], "v")
        axes.plot(one.at / S, lanes.index(one.kind), marker, markersize=5, color=colour)
        axes.plot(
            [one.at / S, (one.at + one.took) / S], [lanes.index(one.kind)] * 2, color=colour, linewidth=3, alpha=0.35
        )
    axes.set_yticks(range(len(lanes)), lanes, fontsize=8.5)
    axes.set(ylim=(len(lanes) - 0.4, -0.6))
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="both", length=0)


def _flags(panels: Sequence[Any], run: Run, colours: Colours) -> None:
    for axes in panels:
        for one in run.events:
            axes.axvline(one.at / S, color=colours["purple"], linewidth=0.7, alpha=0.55)


def _phases(panels: Sequence[Any], run: Run, colours: Colours) -> None:
    """Their begins as lines, and the end of the last; their names on top."""
    for axes in panels:
        axes.axvline(run.schedule.end / S, color=colours["muted"], linewidth=0.8, linestyle=(0, (1, 2)))
    for number, ((begin, end), phase) in enumerate(zip(run.schedule.phases, run.scenario["phases"], strict=True)):
        for axes in panels:
            if number:
                axes.axvline(begin / S, color=colours["muted"], linewidth=0.8, linestyle=(0, (1, 2)))
        if len(run.schedule.phases) > 1:
            name = phase["name"] + ("" if phase.get("measured", True) else " (warm-up)")
            panels[0].text(
                (begin + end) / 2 / S,
                1.02,
                name,
                transform=panels[0].get_xaxis_transform(),
                ha="center",
                va="bottom",
                color=colours["muted"],
                fontsize=8.5,
            )
