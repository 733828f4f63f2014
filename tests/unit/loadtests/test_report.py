"""The report of a run: one file that needs nothing else, and says what the run came to."""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch

from loadtests import charts, curves, gates, points, report, timelines
from loadtests.charts import Absent, Chart
from loadtests.recording import TIERS, Array, Event, Outcome, Run
from tests.unit.loadtests.runs import MS, S, Shape, run_of

CHARTS = (
    timelines.timeline,
    curves.throughput,
    curves.goodput,
    curves.adapters,
    curves.cold_starts,
    timelines.hit_ratio,
    timelines.token_gaps,
    curves.fairness,
    timelines.heat_map,
)
KILL = Event(14 * S, "kill-replica", "replica-0")


def _overloaded(planned: Array, rows: Array) -> None:
    """Each phase asks twice as much as the one before, of more adapters, and the last too much."""
    rows["outcome"][(planned["phase"] == 0) & (rows["index"] % 2 == 0)] = Outcome.UNSENT
    slow = planned["phase"] == 2
    for name in ("first", "last", "done"):
        rows[name][slow] += 1_500 * MS
    planned["model"][planned["phase"] == 0] = 0
    rows["tier"][::3], rows["load_us"][::3] = TIERS.index("cold"), 40_000


def _sweep() -> Run:
    run = run_of(Shape(phases=("low", "high", "over"), groups={"a": 2, "b": 1}), change=_overloaded, events=(KILL,))
    for rate, phase in zip((10.0, 20.0, 40.0), run.scenario["phases"], strict=True):
        for load in phase["load"]:
            load["arrivals"]["rate"] = rate
    rows = run.samples.rows
    kept = rows["outcome"] != Outcome.UNSENT
    ends = (kept.cumsum() * 5)[kept].astype("u8")
    chunk_at = run.samples.chunk_at.reshape(-1, 5)[kept].ravel()
    return replace(run, samples=replace(run.samples, rows=rows[kept], chunk_ends=ends, chunk_at=chunk_at))


def _more_adapters(planned: Array, rows: Array) -> None:
    planned["model"][planned["phase"] == 0] = 0


def _scaling() -> Run:
    return run_of(Shape(phases=("few", "many")), change=_more_adapters)


class Outline(HTMLParser):
    """The elements of a page and what they refer to."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("href", "src", "xlink:href", "action")]


def test_a_report_is_one_file_without_network_or_script(tmp_path: Path) -> None:
    """Nothing in it refers to anything outside it, and its policy forbids that too; charts have the page's colours."""
    run = _sweep()
    path = report.write(run, gates.judge(run), tmp_path)
    page = path.read_text()
    outline = Outline()
    outline.feed(page)
    assert not {"script", "iframe", "object", "embed"} & set(outline.tags)
    assert all(one.startswith(("#", "data:")) for one in outline.references)
    assert not re.search(r"url\((?!#)|@import", page)
    assert "default-src 'none'" in page
    assert outline.tags.count("figure") == len(_drawn(run)) == len(CHARTS) - 1
    drawn = "".join(re.findall(r"<figure.*?</figure>", page, re.DOTALL))
    assert not re.search(r"#[0-9a-fA-F]{6}\b", drawn)
    assert set(re.findall(r"var\(--(\w+)\)", drawn)) <= set(charts.LIGHT)
    assert sorted(one.stem for one in (tmp_path / "charts").iterdir()) == sorted(_drawn(run))


def _drawn(run: Run) -> list[str]:
    return [one.name for chart in CHARTS if isinstance(one := chart(run), Chart)]


@pytest.mark.parametrize("colours", [charts.LIGHT, charts.DARK], ids=["light", "dark"])
def test_colours_stand_out_from_their_ground(colours: charts.Colours) -> None:
    """At least 4.5 to 1 for all that is read, as WCAG 2.2 asks of text."""
    for name, colour in colours.items():
        if name not in ("surface", "grid"):
            assert _contrast(colour, colours["surface"]) >= 4.5, name


def test_the_page_has_the_charts_colours() -> None:
    """The pictures' are the page's in its light form."""
    light, dark = report._css().split("@media (prefers-color-scheme: dark)")
    for colours, part in ((charts.LIGHT, light), (charts.DARK, dark)):
        for name, colour in colours.items():
            assert f"--{name}: {colour}" in part


def _contrast(one: str, other: str) -> float:
    def light(colour: str) -> float:
        parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def test_a_report_says_the_verdict_and_why() -> None:
    """For each gate, and what is a server's text is text."""
    run = run_of(gates=[{"metric": "error_share", "at_most": 0}, {"metric": "recovery_s", "at_most": 1}])
    rows = run.samples.rows
    rows["outcome"][0], rows["error"][0] = Outcome.ERROR_EVENT, len(run.samples.texts)
    run = replace(run, samples=replace(run.samples, texts=(*run.samples.texts, "<script>alert(1)</script>")))
    page = report.page(run, gates.judge(run), "")
    assert 'class="verdict fail"' in page
    assert "error_share ≤ 0" in page
    assert "Nothing in the run tells it." in page
    assert "<script>" not in page
    assert "error_event 200 &lt;script&gt;" in page


def test_a_chart_without_data_says_why() -> None:
    """Instead of an empty frame."""
    one = run_of(Shape(groups={"alone": 1}))
    absent = [made for chart in CHARTS if isinstance(made := chart(one), Absent)]
    assert [made.reason for made in absent] == [
        "the run offered one load only",
        "the run offered one load only",
        "every phase asked equally many adapters",
        "only one tenant asked",
        "only one tenant asked",
    ]


@pytest.mark.parametrize("chart", [curves.throughput, curves.goodput])
def test_a_curve_of_rates_goes_through_the_same_load_only(chart: Callable[[Run], Chart | Absent]) -> None:
    """Not through what other tenants asked, nor through one rate that chance made two."""
    assert isinstance(chart(_sweep()), Chart)
    same = chart(run_of(Shape(phases=("calm", "churn"))))
    assert isinstance(same, Absent)
    assert same.reason == "the run offered one load only"
    other = _sweep()
    del other.scenario["phases"][0]["load"][1]  # the noisy one comes later
    absent = chart(other)
    assert isinstance(absent, Absent)
    assert "different things" in absent.reason


def test_a_curve_of_adapters_goes_through_one_rate_only() -> None:
    """More requests ask more adapters, and wait longer for another reason."""
    assert isinstance(curves.adapters(_scaling()), Chart)
    absent = curves.adapters(_sweep())
    assert isinstance(absent, Absent)
    assert absent.reason == "the phases differ in more than in the adapters they ask"


@pytest.mark.parametrize("chart", [curves.fairness, timelines.heat_map])
def test_tenants_who_never_met_are_not_held_against_each_other(chart: Callable[[Run], Chart | Absent]) -> None:
    """Each had the server for itself."""

    def apart(planned: Array, _rows: Array) -> None:
        planned["tenant"] = planned["phase"]

    shape = Shape(phases=("one", "two"))
    assert isinstance(chart(run_of(shape)), Chart)
    absent = chart(run_of(shape, change=apart))
    assert isinstance(absent, Absent)
    assert absent.reason == "no two tenants asked in one phase"


def test_what_failed_is_drawn_when_it_failed() -> None:
    """Not when it was scheduled: nothing fails before the kill that it fails of."""

    def broke(_planned: Array, rows: Array) -> None:
        before = (rows["scheduled"] > 4 * S) & (rows["scheduled"] < 5 * S)
        rows["outcome"][before], rows["done"][before] = Outcome.TRUNCATED, int(5.5 * S)

    chart = timelines.timeline(run_of(change=broke))
    assert isinstance(chart, Chart)
    figure = Figure()
    chart.draw(figure, charts.LIGHT)
    failed = next(one for one in figure.axes[0].patches if one.get_label() == "failed")
    assert isinstance(failed, StepPatch)
    rates, edges, _ = failed.get_data()
    assert [(edge, rate > 0) for edge, rate in zip(edges, rates, strict=False) if 4 <= edge < 6 and rate > 0] == [
        (edges[np.searchsorted(edges, 5.5, side="right") - 1], True)
    ]


def test_groups_stand_in_the_scenarios_order() -> None:
    """As their author told them, not by the alphabet."""
    page = report.page(run_of(Shape(groups={"quiet": 2, "noisy": 1})), [], "")
    assert 0 < page.index("\u2003quiet") < page.index("\u2003noisy")


def test_a_run_that_came_to_nothing_has_a_report(tmp_path: Path) -> None:
    """All broken, and not a request."""

    def broken(_planned: Array, rows: Array) -> None:
        rows["outcome"], rows["status"], rows["tier"], rows["chunks"] = Outcome.BROKEN, -1, 0, 0
        for name in ("headers", "first", "last"):
            rows[name] = -1

    run = run_of(change=broken)
    run = replace(run, samples=replace(run.samples, chunk_ends=run.samples.chunk_ends * 0))
    assert "✗ fail" in report.write(run, gates.judge(run), tmp_path).read_text()
    nothing = replace(
        run, samples=replace(run.samples, rows=run.samples.rows[:0], chunk_ends=run.samples.chunk_ends[:0])
    )
    assert "inconclusive" in report.write(nothing, gates.judge(nothing), tmp_path).read_text()


def test_the_knee_is_where_the_objective_is_last_kept() -> None:
    """The third load breaks it; a report is drawn for the goal of its sweep."""
    found = points.points_of(_sweep())
    assert [round(one.offered) for one in found] == [20, 40, 40]
    assert [one.kept_share for one in found] == [1, 1, 0]
    kept = points.knee_of(found[:2])
    assert kept.rate == pytest.approx(40)
    assert not kept.reached
    assert math.isnan(points.knee_of(found[2:]).rate)
    drawn = curves.goodput(replace(_sweep(), readings={"goal": 0.75}))
    assert isinstance(drawn, Chart)
    assert "75% keep" in drawn.note


def test_a_chart_draws_the_same_twice() -> None:
    """Byte for byte, so that reports can be compared."""
    made = curves.cold_starts(_sweep())
    assert isinstance(made, Chart)
    assert charts.svg(made) == charts.svg(made)


def test_a_ramps_parts_are_loads_of_their_own() -> None:
    """A phase whose rate climbs tells as much as several phases."""
    run = run_of(Shape(rate=40))
    phase = run.scenario["phases"][0]
    ramp = {"law": "steps", "rates": [20.0, 40.0, 60.0]}
    phase["load"][0]["arrivals"] = ramp
    assert len(points.points_of(run)) == 3
    assert isinstance(curves.throughput(run), Chart)
