"""The charts whose axis is not time: load, adapters, waiting, tenants."""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from loadtests import metrics, statistics
from loadtests.asking import groups_of, no_curve_of_adapters, no_curve_of_rates, tenants_met
from loadtests.axes import beside, brief, log_axis
from loadtests.charts import SERIES, Absent, Chart, Colours
from loadtests.points import Knee, goal_of, knee_of, points_of
from loadtests.recording import TIERS, Run
from loadtests.selection import MS, Selected, select

_NAMED: Final = 30  # tenants whose names fit beside their bars


def throughput(run: Run) -> Chart | Absent:
    """Throughput against time to first token, with the knee."""
    title = "Throughput against time to first token"
    if reason := no_curve_of_rates(run):
        return Absent(title, reason)
    points = sorted(points_of(run), key=lambda one: one.offered)
    if len(points) < 2:
        return Absent(title, "one load only was sent")
    knee = knee_of(points, goal_of(run))

    def draw(figure: Figure, colours: Colours) -> None:
        axes = figure.subplots()
        for name, colour, marker in (("ttft_p50_ms", "blue", "o"), ("ttft_p99_ms", "orange", "s")):
            label = {"ttft_p50_ms": "TTFT p50", "ttft_p99_ms": "TTFT p99"}[name]
            x, y = [one.rate for one in points], [getattr(one, name) for one in points]
            axes.plot(x, y, marker=marker, markersize=4.5, color=colours[colour], label=label)
        if knee.reached and not math.isnan(knee.rate):
            answered = np.interp(knee.rate, [one.offered for one in points], [one.rate for one in points])
            _mark(axes, float(answered), f"knee: {knee.rate:.3g} requests/s offered", colours)
        _objective(axes, run, "ttft_ms", colours)
        log_axis(axes.yaxis)
        axes.set(xlabel="whole answers per second", ylabel="ms, from scheduled", xlim=(0, None))
        beside(axes)

    return Chart("throughput-ttft", title, _knee_note(knee), draw)


def goodput(run: Run) -> Chart | Absent:
    """Goodput against the offered rate."""
    title = "Goodput against offered rate"
    if reason := no_curve_of_rates(run):
        return Absent(title, reason)
    points = sorted(points_of(run), key=lambda one: one.offered)
    if len(points) < 2:
        return Absent(title, "one load only was sent")
    knee = knee_of(points, goal_of(run))

    def draw(figure: Figure, colours: Colours) -> None:
        axes = figure.subplots()
        x = [one.offered for one in points]
        axes.plot(x, x, color=colours["muted"], linestyle=":", label="offered")
        axes.plot(
            x, [one.rate for one in points], marker="s", markersize=4, color=colours["orange"], label="throughput"
        )
        axes.plot(
            x, [one.goodput for one in points], marker="o", markersize=4.5, color=colours["blue"], label="goodput"
        )
        if knee.reached and not math.isnan(knee.rate):
            _mark(axes, knee.rate, f"knee: {knee.rate:.3g}", colours)
        axes.set(xlabel="requests offered per second", ylabel="requests per second", xlim=(0, None), ylim=(0, None))
        beside(axes)

    note = f"Goodput counts the answers that keep the objective ({objective_words(run)}). {_knee_note(knee)}"
    return Chart("goodput-offered", title, note, draw)


def adapters(run: Run) -> Chart | Absent:
    """Goodput, waiting and slot hits against how many adapters are asked, with the line of the slots."""
    title = "Goodput, time to first token and slot hits against adapters"
    points = sorted((one for one in points_of(run) if one.adapters), key=lambda one: one.adapters)
    if len({one.adapters for one in points}) < 2:
        return Absent(title, "every phase asked equally many adapters")
    if reason := no_curve_of_adapters(run):
        return Absent(title, reason)
    slots = metrics.all_slots(run)

    def draw(figure: Figure, colours: Colours) -> None:
        panels = figure.subplots(3, sharex=True)
        x = [one.adapters for one in points]
        for axes, name, label, colour, marker in (
            (panels[0], "offered", "offered", "muted", ""),
            (panels[0], "goodput", "goodput", "blue", "o"),
            (panels[1], "ttft_p50_ms", "TTFT p50", "blue", "o"),
            (panels[1], "ttft_p99_ms", "TTFT p99", "orange", "s"),
            (panels[2], "hit_ratio", "slot hits", "green", "s"),
        ):
            y, style = [getattr(one, name) for one in points], "-" if marker else ":"
            axes.plot(x, y, marker=marker, markersize=4.5, linestyle=style, color=colours[colour], label=label)
        log_axis(panels[1].yaxis)
        panels[0].set(ylabel="requests/s", ylim=(0, None))
        panels[1].set(ylabel="ms, from scheduled")
        panels[2].set(xlabel="different adapters asked", ylabel="share of hits", ylim=(0, 1.05))
        panels[2].set_xscale("log", base=2)
        panels[2].xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panels[2].set_xticks(sorted(set(x)))
        panels[2].xaxis.set_minor_locator(NullLocator())
        for place, axes in enumerate(panels):
            beside(axes)
            if slots is not None:
                _mark(axes, slots, "" if place else f"{slots} slots", colours)

    note = "Right of the line more adapters are asked than all replicas' slots hold, so that some wait for a load."
    return Chart("goodput-adapters", title, note, draw, height=5.0)


def cold_starts(run: Run) -> Chart | Absent:
    """The distribution of the time to first token by where the adapter was."""
    title = "Time to first token by where the adapter was"
    chosen = select(run)
    values = {}
    for number, tier in enumerate(TIERS[1:], 1):
        of_tier = Selected(run, chosen.at[chosen.rows["tier"] == number])
        if len(times := np.sort(metrics.TIMES["ttft_ms"](of_tier))):
            values[tier] = times
    if not values:
        return Absent(title, "the server did not tell where adapters were")

    def draw(figure: Figure, colours: Colours) -> None:
        axes = figure.subplots()
        for tier, colour in zip(TIERS[1:], ("muted", "blue", "green", "orange"), strict=True):
            if tier in values:
                times = values[tier]
                label = f"{tier}: {len(times):,} requests, p50 {brief(statistics.percentile(times, 0.5))} ms"
                share = np.arange(1, len(times) + 1) / len(times)
                axes.step(*_thinned(times, share), where="post", color=colours[colour], label=label)
        log_axis(axes.xaxis)
        axes.set(xlabel="ms, from scheduled", ylabel="share of requests", ylim=(0, 1.02))
        _objective(axes, run, "ttft_ms", colours, vertical=True)
        beside(axes)

    note = "gpu: it was in a slot. host: in the engine's memory. cold: it had to be read from disk. base: no adapter."
    return Chart("cold-starts", title, note, draw)


def fairness(run: Run) -> Chart | Absent:
    """What each tenant was served, over his fair part, and what he waited."""
    title = "What each tenant was served"
    chosen = select(run)
    tenants, parts = metrics.fair_parts(chosen)
    if len(tenants) < 2:
        return Absent(title, "only one tenant asked")
    if not tenants_met(chosen):
        return Absent(title, "no two tenants asked in one phase")
    names = groups_of(run)
    order = np.lexsort((parts, np.array([names.index(run.schedule.groups[tenant]) for tenant in tenants])))
    tenants, parts = tenants[order], parts[order]
    groups = [run.schedule.groups[tenant] for tenant in tenants]
    waits = np.array([_waits(chosen, int(tenant)) for tenant in tenants])

    def draw(figure: Figure, colours: Colours) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        there = [name for name in names if name in groups]
        for name, colour in zip(there, _repeated(len(there)), strict=True):
            y = np.flatnonzero([group == name for group in groups])
            left.barh(y, parts[y], height=0.7, color=colours[colour])
            right.plot(waits[y, 0], y, "o", markersize=4.5, markerfacecolor="none", color=colours[colour])
            right.plot(waits[y, 1], y, "o", markersize=4.5, color=colours[colour], label=name)
        left.axvline(1, color=colours["muted"], linestyle="--", linewidth=1)
        left.set(xlabel="served ÷ fair part", xlim=(0, max(1.15, float(parts.max()) * 1.05)))
        right.set(xlabel="response time, ms: p50 hollow, p99 filled")
        log_axis(right.xaxis)
        left.set(ylim=(len(tenants) - 0.4, -0.6))
        for axes in (left, right):
            axes.grid(visible=False, axis="y")
        if len(tenants) <= _NAMED:
            left.set_yticks(range(len(tenants)), [run.schedule.tenants[tenant] for tenant in tenants])
        else:
            left.set(ylabel=f"{len(tenants)} tenants, by group and by what each was served", yticks=[])
        if 1 < len(there) <= len(SERIES):
            beside(right)

    jain = statistics.jain(parts)
    note = (
        f"Jain's index {jain:.3f}, least part {float(parts.min()):.3f}. The fair part is max-min: nobody's is more "
        "than he asked for, and what one leaves the others share, so that a tenant held to his part stands at 1."
    )
    return Chart("fairness", title, note, draw, height=0.9 + 0.2 * min(max(4, len(tenants)), _NAMED))


def objective_words(run: Run) -> str:
    """The scenario's objective as one reads it."""
    objective: dict[str, Any] = run.scenario.get("objective") or {}
    told = [f"{name.removesuffix('_ms')} ≤ {bound:g} ms" for name, bound in objective.items() if bound is not None]
    return ", ".join(told) or "none"


def _knee_note(knee: Knee) -> str:
    if math.isnan(knee.rate):
        return f"At no load did {knee.level:.0%} of the requests keep the objective."
    if not knee.reached:
        return f"The knee is beyond {knee.rate:.3g} requests/s: at every load {knee.level:.0%} keep the objective."
    return f"The knee, {knee.rate:.3g} requests/s offered, is the load up to which {knee.level:.0%} keep the objective."


def _waits(chosen: Selected, tenant: int) -> tuple[float, float]:
    rows = chosen.rows[chosen.whole & (chosen.planned["tenant"] == tenant)]
    times = (rows["done"] - rows["scheduled"]) / MS
    return statistics.percentile(times, 0.5), statistics.percentile(times, 0.99)


def _thinned(x: Any, y: Any, most: int = 400) -> tuple[Any, Any]:
    """As much of a curve as is seen."""
    kept = np.unique(np.linspace(0, len(x) - 1, most).astype(int))
    return x[kept], y[kept]


def _repeated(count: int) -> Sequence[str]:
    return SERIES[:count] if count <= len(SERIES) else ("blue",) * count


def _mark(axes: Any, x: float, text: str, colours: Colours) -> None:
    """A line across, its name above the frame, where nothing else is."""
    axes.axvline(x, color=colours["red"], linestyle="--", linewidth=1.1)
    if text:
        place = {"xy": (x, 1), "xycoords": ("data", "axes fraction"), "xytext": (0, 3), "textcoords": "offset points"}
        axes.annotate(text, ha="center", va="bottom", color=colours["red"], fontsize=9, **place)


def _objective(axes: Any, run: Run, name: str, colours: Colours, *, vertical: bool = False) -> None:
    bound = (run.scenario.get("objective") or {}).get(name)
    low, high = axes.get_xlim() if vertical else axes.get_ylim()
    if bound is not None and low <= bound <= high * 3:
        (axes.axvline if vertical else axes.axhline)(
            bound, color=colours["muted"], linestyle="-.", linewidth=1, label=f"objective: {brief(bound)} ms"
        )
