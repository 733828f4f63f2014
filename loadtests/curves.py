"""The charts whose axis is not time: load, adapters, waiting, tenants."""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from loadtests import metrics, statistics
from loadtests.axes import beside, log_axis
from loadtests.charts import SERIES, Absent, Chart, Colours
from loadtests.points import Knee, goal_of, knee_of, points_of
from loadtests.recording import TIERS, Run
from loadtests.selection import MS, Selected, select

_NAMED: Final = 30  # tenants whose names fit below their bars


def throughput(run: Run) -> Chart | Absent:
    """Throughput against time to first token, with the knee."""
    title = "Throughput against time to first token"
    points = sorted(points_of(run), key=lambda one: one.offered)
    if len({round(one.offered, 1) for one in points}) < 2:
        return Absent(title, "the run offered one load only")
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
    points = sorted(points_of(run), key=lambda one: one.offered)
    if len({round(one.offered, 1) for one in points}) < 2:
        return Absent(title, "the run offered one load only")
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
    """Goodput against how many adapters are asked, with the line of the slots."""
    title = "Goodput against adapters"
    points = sorted((one for one in points_of(run) if one.adapters), key=lambda one: one.adapters)
    if len({one.adapters for one in points}) < 2:
        return Absent(title, "every phase asked equally many adapters")
    slots = metrics.all_slots(run)

    def draw(figure: Figure, colours: Colours) -> None:
        upper, lower = figure.subplots(2, sharex=True)
        x = [one.adapters for one in points]
        upper.plot(x, [one.offered for one in points], color=colours["muted"], linestyle=":", label="offered")
        upper.plot(
            x, [one.goodput for one in points], marker="o", markersize=4.5, color=colours["blue"], label="goodput"
        )
        lower.plot(x, [one.hit_ratio for one in points], marker="s", markersize=4.5, color=colours["green"])
        upper.set(ylabel="requests/s", ylim=(0, None))
        lower.set(xlabel="different adapters asked", ylabel="slot hit ratio", ylim=(0, 1.05))
        lower.set_xscale("log", base=2)
        lower.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        lower.set_xticks(sorted(set(x)))
        lower.xaxis.set_minor_locator(NullLocator())
        beside(upper)
        if slots is not None:
            _mark(upper, slots, f"{slots} slots", colours)
            _mark(lower, slots, "", colours)

    note = "Right of the line more adapters are asked than all replicas' slots hold, so that some wait for a load."
    return Chart("goodput-adapters", title, note, draw, height=3.8)


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
                label = f"{tier}: {len(times):,} requests, p50 {_brief(statistics.percentile(times, 0.5))} ms"
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
    order = np.lexsort((parts, [run.schedule.groups[tenant] for tenant in tenants]))
    tenants, parts = tenants[order], parts[order]
    groups = [run.schedule.groups[tenant] for tenant in tenants]
    waits = [_wait(chosen, int(tenant)) for tenant in tenants]

    def draw(figure: Figure, colours: Colours) -> None:
        upper, lower = figure.subplots(2, sharex=True)
        middle, room = (len(tenants) - 1) / 2, max(len(tenants), 8) / 2 + 0.1
        names = list(dict.fromkeys(groups))
        for name, colour in zip(names, _repeated(len(names)), strict=True):
            x = [place for place, group in enumerate(groups) if group == name]
            upper.bar(x, parts[x], width=0.75, color=colours[colour], label=name)
            lower.plot(x, [waits[place] for place in x], "o", markersize=4, color=colours[colour])
        upper.axhline(1, color=colours["muted"], linestyle="--", linewidth=1)
        upper.set(ylabel="served ÷ fair part", ylim=(0, max(1.15, float(parts.max()) * 1.05)))
        lower.set(ylabel="response p99, ms")
        log_axis(lower.yaxis)
        for axes in (upper, lower):
            axes.grid(visible=False, axis="x")
            axes.set_xlim(middle - room, middle + room)
        if len(tenants) <= _NAMED:
            labels = [run.schedule.tenants[tenant] for tenant in tenants]
            lower.set_xticks(range(len(tenants)), labels, rotation=45, ha="right", rotation_mode="anchor")
        else:
            lower.set(xlabel=f"{len(tenants)} tenants, by group and by what each was served")
        if 1 < len(names) <= len(SERIES):
            beside(upper)

    jain = statistics.jain(parts)
    note = (
        f"Jain's index {jain:.3f}, least part {float(parts.min()):.3f}. The fair part is max-min: nobody's is more "
        "than he asked for, and what one leaves the others share, so that a tenant held to his part stands at 1."
    )
    return Chart("fairness", title, note, draw, height=4.2)


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


def _wait(chosen: Selected, tenant: int) -> float:
    rows = chosen.rows[chosen.whole & (chosen.planned["tenant"] == tenant)]
    return statistics.percentile((rows["done"] - rows["scheduled"]) / MS, 0.99)


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
            bound, color=colours["muted"], linestyle="-.", linewidth=1, label=f"objective: {bound:g} ms"
        )


def _brief(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
