"""A run's folder: what it was made of and left, to be read again, and its verdicts for people, CI and spreadsheets.

| file | what |
| --- | --- |
| `scenario.yaml` | the scenario as it was run, profile merged in |
| `run.json` | target, machine, events, versions' lives, lateness |
| `schedule.npz`, `samples.npz` | every request as planned and as it went |
| `summary.json` | verdicts and figures |
| `junit.xml` | a test case a gate; an inconclusive one is an error, so that CI is not green |
| `requests.csv` | a line a request |
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree
from zipfile import BadZipFile

import numpy as np
import yaml

from loadtests import gates, isolation, metrics
from loadtests.gates import Judgement, Verdict
from loadtests.recording import ABSENT, TIERS, Array, Event, Lateness, Outcome, Run, Samples, Schedule, VersionLife
from loadtests.selection import MS, Selected, offered, select

TOLD: Final = (
    "offered_rate",
    "rate",
    "goodput",
    "goodput_share",
    "tokens_per_s",
    *(
        f"{name}.{statistic}"
        for name in ("ttft_ms", "response_ms", "service_ms")
        for statistic in ("p50", "p99", "max")
    ),
    *("itl_ms.p50", "itl_ms.p99", "tpot_ms.p50", "queue_ms.p99", "load_ms.p50", "load_ms.p99", "lateness_ms.p99"),
    *("requests.sent", "requests.whole", "requests.failed", "requests.refused", "error_share", "refused_share"),
    *("wrong_adapter", "adapters", "hit_ratio", "hit_ratio.predicted", "hit_ratio.lru", "cached_share"),
    *("fairness.jain", "fairness.least_share", "recovery_s", "actions.failed"),
)
"""The figures that every summary has."""
_LINES: Final = 10_000


class ResultsUnreadable(Exception):
    """A folder that holds no run; the text says what is missing or wrong."""


def write(run: Run, verdicts: Sequence[Verdict], folder: Path) -> None:
    """Its verdicts and figures, for people, CI and spreadsheets, into the folder of a run that was saved."""
    (folder / "summary.json").write_text(json.dumps(summary(run, verdicts), indent=1, ensure_ascii=False))
    ElementTree.ElementTree(_junit(run, verdicts)).write(folder / "junit.xml", "utf-8", xml_declaration=True)
    _write_requests(run, folder / "requests.csv")


VERDICTS: Final = ("summary.json", "junit.xml", "requests.csv", "report.html")


def clear(folder: Path) -> None:
    """Take away an earlier run's verdicts: nobody shall take them for those of one that cannot be run."""
    for name in VERDICTS:
        (folder / name).unlink(missing_ok=True)


def write_fault(folder: Path, name: str, text: str) -> None:
    """Tell CI that there was nothing to judge, and why."""
    about = {"name": f"loadtest.{name}", "tests": "1", "failures": "0", "errors": "1"}
    suite = ElementTree.Element("testsuite", about)
    case = ElementTree.SubElement(suite, "testcase", classname=f"loadtest.{name}", name="it could be run")
    ElementTree.SubElement(case, "error", message=text, type="unusable")
    folder.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(suite).write(folder / "junit.xml", "utf-8", xml_declaration=True)


def save(run: Run, folder: Path) -> None:
    """What `load` reads, into its folder, which is made if it is not there; before anybody judges it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scenario.yaml").write_text(yaml.safe_dump(run.scenario, sort_keys=False, allow_unicode=True))
    run.samples.save(folder / "samples.npz")
    np.savez(folder / "schedule.npz", planned=run.schedule.planned)
    plain = ("target", "machine", "started_at", "unfinished", "readings", "base_answer", "shard")
    told = {name: getattr(run, name) for name in plain}
    told |= {name: [asdict(one) for one in getattr(run, name)] for name in ("events", "versions", "lateness")}
    told["schedule"] = {name: getattr(run.schedule, name) for name in ("tenants", "groups", "models", "workloads")}
    told["schedule"]["phases"] = run.schedule.phases
    (folder / "run.json").write_text(json.dumps(told, indent=1, ensure_ascii=False))


def load(folder: Path) -> Run:
    """The run of a folder.

    Raises:
        ResultsUnreadable: it is none, or not whole.
    """
    try:
        scenario = yaml.safe_load((folder / "scenario.yaml").read_text())
        told = json.loads((folder / "run.json").read_text())
        with np.load(folder / "schedule.npz", allow_pickle=False) as found:
            planned = found["planned"]
        return Run(
            scenario=scenario,
            schedule=_schedule(planned, told.pop("schedule")),
            shard=tuple(told.pop("shard", (0, 1))),
            samples=Samples.load(folder / "samples.npz"),
            events=tuple(Event(**one) for one in told.pop("events")),
            versions=tuple(VersionLife(**one) for one in told.pop("versions")),
            lateness=tuple(Lateness(**one) for one in told.pop("lateness")),
            **told,
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile, yaml.YAMLError) as error:
        raise ResultsUnreadable(f"{folder}: not the results of a load test: {error}") from error


def _schedule(planned: Array, told: dict[str, Any]) -> Schedule:
    names = {name: tuple(told[name]) for name in ("tenants", "groups", "models", "workloads")}
    return Schedule(planned, phases=tuple((begin, end) for begin, end in told["phases"]), **names)


def summary(run: Run, verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Verdicts, and the figures of all that is measured, of every phase and of every group, as JSON takes them."""
    groups = sorted(set(run.schedule.groups))
    code = gates.exit_code(verdicts, run)
    return {
        "scenario": run.scenario["name"],
        "question": run.scenario["question"],
        "started_at": run.started_at,
        "verdict": {gates.PASSED: "pass", gates.FAILED: "fail"}.get(code, "inconclusive"),
        "exit_code": code,
        "gates": [_plain(asdict(one)) for one in verdicts],
        "measured": figures(select(run)),
        "phases": {
            one["name"]: {"all": figures(select(run, phase=one["name"]))}
            | ({name: figures(select(run, phase=one["name"], tenants=name)) for name in groups} if groups[1:] else {})
            for one in run.scenario["phases"]
        },
        "errors": errors(run),
        "canaries": asdict(isolation.canaries(run)),
        "target": run.target,
        "machine": run.machine,
        "lateness": [asdict(one) for one in run.lateness],
        "unfinished": run.unfinished,
    }


def figures(chosen: Selected, names: Iterable[str] = TOLD) -> dict[str, float | None]:
    """Each figure that the run tells of these requests; None where it does not."""
    return {name: _number(metrics.of(chosen, name).value) for name in names}


def errors(run: Run) -> dict[str, int]:
    """How often each thing went wrong, the most frequent first; refusals too, for they say why."""
    wrong = ~np.isin(run.samples.rows["outcome"], (Outcome.WHOLE, Outcome.ABORTED))
    rows = run.samples.rows[wrong & offered(run)]
    told = Counter(zip(rows["outcome"].tolist(), rows["status"].tolist(), rows["error"].tolist(), strict=True))
    return {
        " ".join(
            one for one in (Outcome(outcome).name.lower(), str(status) if status > 0 else "", _text(run, error)) if one
        ): count
        for (outcome, status, error), count in told.most_common()
    }


def _text(run: Run, place: int) -> str:
    return run.samples.texts[place] if place > 0 else ""


def _number(value: float) -> float | None:
    return None if math.isnan(value) or math.isinf(value) else round(value, 6)


def _plain(told: Any) -> Any:
    if isinstance(told, dict):
        return {name: _plain(value) for name, value in told.items()}
    if isinstance(told, list | tuple):
        return [_plain(value) for value in told]
    return _number(told) if isinstance(told, float) else told


def _junit(run: Run, verdicts: Sequence[Verdict]) -> ElementTree.Element:
    count = Counter(one.judgement for one in verdicts)
    counts = {"failures": str(count[Judgement.FAIL]), "errors": str(count[Judgement.INCONCLUSIVE])}
    name = f"loadtest.{run.scenario['name']}"
    about = {"name": name, "tests": str(len(verdicts)), "timestamp": run.started_at}
    suite = ElementTree.Element("testsuite", about | counts)
    for one in verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname=name, name=one.gate)
        if one.judgement is not Judgement.PASS:
            kind = "failure" if one.judgement is Judgement.FAIL else "error"
            ElementTree.SubElement(case, kind, message=one.reason, type=str(one.judgement))
    return suite


def _write_requests(run: Run, path: Path) -> None:
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(COLUMNS)
        for start in range(0, len(run.samples.rows), _LINES):
            lines.writerows(_lines(run, np.arange(start, min(start + _LINES, len(run.samples.rows)))))


COLUMNS: Final = (
    *("index", "phase", "tenant", "adapter", "workload", "turn", "canary", "scheduled_s", "sent_s"),
    *("ttft_ms", "response_ms", "service_ms", "outcome", "status", "tier", "chunks", "prompt_tokens"),
    *("completion_tokens", "cached_tokens", "queue_ms", "load_ms", "version", "replica", "error", "wrong_adapter"),
)


def _lines(run: Run, at: Array) -> Iterable[tuple[Any, ...]]:
    rows, schedule, texts = run.samples.rows[at], run.schedule, run.samples.texts
    phases, wrong = [one["name"] for one in run.scenario["phases"]], isolation.wrong(run, at)
    for row, plan, mixed_up in zip(rows, schedule.planned[rows["index"]], wrong, strict=True):
        yield (
            row["index"],
            phases[plan["phase"]],
            schedule.tenants[plan["tenant"]],
            "" if plan["model"] == ABSENT else schedule.models[plan["model"]],
            schedule.workloads[plan["workload"]],
            plan["turn"],
            int(plan["canary"]),
            _span(0, row["scheduled"], 1e9),
            _span(0, row["sent"], 1e9),
            _span(row["scheduled"], row["first"], MS),
            _span(row["scheduled"], row["done"], MS),
            _span(row["sent"], row["done"], MS),
            Outcome(row["outcome"]).name.lower(),
            *(_told(row[name]) for name in ("status",)),
            TIERS[row["tier"]],
            *(_told(row[name]) for name in ("chunks", "prompt_tokens", "completion_tokens", "cached_tokens")),
            _span(0, row["queue_us"], 1e3),
            _span(0, row["load_us"], 1e3),
            *(texts[row[name]] if row[name] > 0 else "" for name in ("version", "replica", "error")),
            int(mixed_up),
        )


def _span(begin: Any, end: Any, unit: float) -> str:
    return "" if ABSENT in (begin, end) else f"{(int(end) - int(begin)) / unit:.6g}"


def _told(value: Any) -> Any:
    return "" if value == ABSENT else value
