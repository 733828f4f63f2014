"""A run as one HTML file that needs no network and no script, with its charts as pictures beside it."""

import base64
import importlib.util
import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any, Final

from loadtests import gates, isolation, results
from loadtests.asking import groups_of
from loadtests.gates import Judgement, Verdict
from loadtests.recording import Run
from loadtests.selection import S, Selected, offered, select

_STACKS: Final = {"fake": "a stack of fake replicas", "cpu": "a stack of vLLM engines on this machine's CPU"}
_EVENTS: Final = 60
_ERRORS: Final = 20
_WORDS: Final = {
    gates.PASSED: ("pass", "Every gate passed."),
    gates.FAILED: ("fail", "The server did not keep what the scenario asks."),
    gates.INCONCLUSIVE: ("inconclusive", "The run cannot say whether the server keeps what the scenario asks."),
}
_COLUMNS: Final = (
    ("offered\nper s", "offered_rate"),
    ("whole\nper s", "rate"),
    ("goodput\nshare", "goodput_share"),
    ("tokens\nper s", "tokens_per_s"),
    ("TTFT, ms\np50 · p99", "ttft_ms.p50", "ttft_ms.p99"),
    ("response, ms\np50 · p99", "response_ms.p50", "response_ms.p99"),
    ("service, ms\np50 · p99", "service_ms.p50", "service_ms.p99"),
    ("chunks apart,\nms, p99", "itl_ms.p99"),
    ("failed", "error_share"),
    ("refused", "refused_share"),
    ("wrong\nadapter", "wrong_adapter"),
    ("slot\nhits", "hit_ratio"),
)
_SHARES: Final = ("goodput_share", "error_share", "refused_share", "hit_ratio")
_GLOSSARY: Final = {
    "response time": "from when a request was scheduled until its last byte: what its user waited, however late "
    "the server let it be sent",
    "service time": "from when it was sent; a server that stops for a while looks well in it",
    "TTFT": "time to first token: from scheduled to the first piece with content; of an answer "
    "that is not streamed its end",
    "goodput": "answers that came whole and kept the scenario's objective",
    "wrong adapter": "answers that another adapter, or another version than the alias had, gave",
    "inconclusive": "too few samples, a late generator, or a schedule not played to its end; never green",
}


def write(run: Run, verdicts: Sequence[Verdict], folder: Path) -> Path:
    """`report.html` in the run's folder, and `charts/*.png` where matplotlib is installed; gives the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "report.html"
    path.write_text(page(run, verdicts, _drawn(run, folder / "charts")), "utf-8")
    return path


def page(run: Run, verdicts: Sequence[Verdict], charts: str) -> str:
    """The whole page."""
    name = escape(run.scenario["name"])
    parts = [_head(run, verdicts), _verdicts(verdicts), _figures(run), charts, _errors(run), _events(run), _about(run)]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}"><title>{name}: load test</title>'
        f'<link rel="icon" href="{_icon(verdicts, run)}"><style>{_css()}</style></head>\n<body><main>\n'
        + "\n".join(one for one in parts if one)
        + "\n</main></body></html>\n"
    )


def _drawn(run: Run, folder: Path) -> str:
    if importlib.util.find_spec("matplotlib") is None:
        return _section(
            "Charts", "<p>Not drawn: matplotlib is missing (<code>pip install 'tailor[loadtest]'</code>).</p>"
        )
    from loadtests import charts, curves, timelines  # matplotlib takes a second to import

    made = [
        chart(run)
        for chart in (
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
    ]
    drawn = [one for one in made if isinstance(one, charts.Chart)]
    folder.mkdir(parents=True, exist_ok=True)
    for one in drawn:
        charts.png(one, folder / f"{one.name}.png")
    figures = "".join(
        f'<figure id="{one.name}"><h3>{escape(one.title)}</h3>{charts.svg(one)}'
        f"<figcaption>{escape(one.note)}</figcaption></figure>"
        for one in drawn
    )
    absent = "; ".join(f"{one.title}: {one.reason}" for one in made if isinstance(one, charts.Absent))
    return _section("Charts", figures + (f"<p class=quiet>Not drawn. {escape(absent)}.</p>" if absent else ""))


def _head(run: Run, verdicts: Sequence[Verdict]) -> str:
    word, sentence = _WORDS[gates.exit_code(verdicts, run)]
    begun = datetime.fromisoformat(run.started_at).strftime("%d %b %Y %H:%M:%S UTC")
    target = run.target
    where = " · ".join(
        str(one)
        for one in (
            _STACKS.get(target.get("kind", ""), target.get("url")),
            target.get("model"),
            _counted(target.get("replicas"), "replica"),
            _counted(target.get("slots"), "slot") + (" each" if target.get("slots") else ""),
            begun,
            f"{run.schedule.end / S:g} s, {int(offered(run).sum()):,} requests",
        )
        if one
    )
    return (
        f"<header><p class=eyebrow>Load test</p><h1>{escape(run.scenario['name'])}</h1>"
        f"<p class=question>{escape(run.scenario['question'])}</p>"
        f'<p class="verdict {word}"><strong>{word}</strong> {sentence}</p><p class=quiet>{escape(where)}</p></header>'
    )


def _verdicts(verdicts: Sequence[Verdict]) -> str:
    signs = {Judgement.PASS: "✓", Judgement.FAIL: "✗", Judgement.INCONCLUSIVE: "?"}
    rows = [
        (
            _Raw(f'<span class="mark {one.judgement}">{signs[one.judgement]} {one.judgement}</span>'),
            one.gate,
            _Raw(f'<span class="number">{_number(one.value)}</span>'),
            _Raw(f'<span class="number">{one.samples:,}</span>'),
            one.reason,
        )
        for one in verdicts
    ]
    return _section("Gates", _table(("", "gate", "value", "samples", "why"), rows, "gates"))


def _figures(run: Run) -> str:
    names = [name for _, *those in _COLUMNS for name in those]
    rows = [(label, results.figures(chosen, names)) for label, chosen in _rows(run)]
    told = [one for one in _COLUMNS if any(figures[one[1]] is not None for _, figures in rows)]
    body = [
        (label, *(" · ".join(_cell(name, figures[name]) for name in those) for _, *those in told))
        for label, figures in rows
    ]
    note = (
        "Response time runs from when a request was scheduled, service time from when it was sent. Answers and tokens "
        "per second are until a phase's last answer came, where that was after its end."
    )
    table = _table(("", *(label for label, *_ in told)), body, "figures")
    return _section("Figures", f"{table}<p class=quiet>{note} {escape(_canaries(run))}</p>")


def _canaries(run: Run) -> str:
    told = isolation.canaries(run)
    if not told.answered:
        return "No canary was answered: wrong adapters are told by the versions in headers alone."
    return (
        f"Of {told.answered:,} canaries answered, {told.compared:,} were compared with the answer known for their "
        f"version, {told.of_base:,} of them with the base model's; of {told.adapters:,} versions, {told.known:,} "
        f"answers are known, {told.distinct:,} of them distinct."
    )


def _rows(run: Run) -> Iterator[tuple[str, Selected]]:
    phases, groups = run.scenario["phases"], groups_of(run)
    yield "all that is measured", select(run)
    for phase in phases:
        if len(phases) > 1:
            warm_up = "" if phase.get("measured", True) else " (warm-up)"
            yield phase["name"] + warm_up, select(run, phase=phase["name"])
        chosen = [(group, select(run, phase=phase["name"], tenants=group)) for group in groups]
        there = [(f"\u2003{group}", one) for group, one in chosen if len(one.at)]
        if len(there) > 1:
            yield from there


def _errors(run: Run) -> str:
    told = results.errors(run)
    if not told:
        return ""
    rows = [(what, f"{count:,}") for what, count in list(told.items())[:_ERRORS]]
    return _section("What was refused or failed", _table(("how", "requests"), rows))


def _events(run: Run) -> str:
    if not run.events:
        return ""
    rows = [
        (f"{one.at / S:.2f} s", one.kind, one.target, f"{one.took / S:.2f} s" if one.took else "", one.error)
        for one in run.events[:_EVENTS]
    ]
    rest = len(run.events) - len(rows)
    more = f"<p class=quiet>{rest:,} more are in run.json.</p>" if rest else ""
    told = 5 if any(one.error for one in run.events) else 4
    table = _table(("at", "what", "of", "took", "error")[:told], (row[:told] for row in rows)) + more
    return _section(
        "What was done meanwhile",
        f"<details{'' if rest else ' open'}><summary>{len(run.events)} events</summary>{table}</details>",
    )


def _about(run: Run) -> str:
    late = [
        (f"process {one.process}", *(_number(value / 1e3) for value in (one.p50_us, one.p99_us, one.most_us)))
        for one in run.lateness
    ]
    late = [(*row, f"{one.cpu_share:.0%}") for row, one in zip(late, run.lateness, strict=True)]
    header = ("generator", "late p50, ms", "late p99, ms", "most, ms", "processor")
    facts = "".join(
        f"<div><dt>{escape(name.replace('_', ' '))}</dt><dd>{escape(_plain(value))}</dd></div>"
        for part in (run.target, run.machine)
        for name, value in part.items()
    )
    words = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _GLOSSARY.items())
    return _section(
        "How it was measured",
        (_table(header, late) if late else "") + f"<dl class=facts>{facts}</dl><dl>{words}</dl>",
    )


class _Raw(str):
    """Markup, not text."""

    __slots__ = ()


def _cell(name: str, value: float | None) -> str:
    if value is None:
        return "–"
    return (
        f"{value:.1%}"
        if name in _SHARES and value not in (0, 1)
        else f"{value:.0%}"
        if name in _SHARES
        else _number(value)
    )


def _counted(count: int | None, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}" if count else ""


def _number(value: float) -> str:
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.4g}" if abs(value) >= 100 else f"{value:.3g}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    def cell(text: str) -> str:
        return text if isinstance(text, _Raw) else escape(text)

    head = "".join(f"<th>{escape(one).replace(chr(10), '<br>')}</th>" for one in header)
    body = "".join(f"<tr>{''.join(f'<td>{cell(one)}</td>' for one in row)}</tr>" for row in rows)
    return f'<div class=wide><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _icon(verdicts: Sequence[Verdict], run: Run) -> str:
    colour = {gates.PASSED: "17805a", gates.FAILED: "c02639"}.get(gates.exit_code(verdicts, run), "b07a00")
    circle = f"<circle cx='4' cy='4' r='4' fill='#{colour}'/>"
    mark = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 8 8'>{circle}</svg>"
    return "data:image/svg+xml;base64," + base64.b64encode(mark.encode()).decode()


def _css() -> str:
    return (Path(__file__).parent / "report.css").read_text()
