"""From samples to verdicts: the figures, their bounds, and how they are written."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Final, Literal

from loadtests.overhead.phases import Round, Sample


@dataclass(frozen=True, slots=True)
class Bound:
    """What a figure must keep and what it aims at; `better` says on which side of them good is."""

    must: float
    aim: float | None
    better: Literal["lower", "higher"]
    text: str


BOUNDS: Final = {
    "cpu_per_request_over_nginx": Bound(4.5, 2.5, "lower", "CPU per request ÷ nginx's"),
    "requests_per_s_over_direct": Bound(0.20, 0.40, "higher", "requests/s ÷ direct, one core"),
    "cpu_per_chunk_over_nginx": Bound(1.9, 1.4, "lower", "CPU per chunk ÷ nginx's, 64 streams × 20 ms"),
    "chunks_per_s_over_direct": Bound(0.95, 0.98, "higher", "chunks/s ÷ direct, 64 streams × 5 ms"),
    "added_ttft_p50_us": Bound(250, 80, "lower", "time to first token p50 − nginx's, µs"),
    "memory_per_worker_mib": Bound(
        90, 60, "lower", "resident memory of a worker, MiB: the larger of at readiness and after load"
    ),
    "start_to_ready_s": Bound(3, 1.5, "lower", "start to ready, s: from exec to the first 200 of /ready"),
    "resolve_admit_cpu_ratio": Bound(1.10, None, "lower", "CPU of resolve + admit, 100,000 adapters ÷ 10"),
    "resolve_admit_rss_mib": Bound(
        150, None, "lower", "resident memory of 100,000 adapters, 10,000 tenants, 20,000 keys, MiB"
    ),
    "failed_operations": Bound(0, None, "lower", "requests that failed, all targets"),
    "features_off": Bound(0, None, "lower", "parts of the gateway that did not take part"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One figure with its verdict."""

    figure: str
    value: float
    must: float
    aim: float | None
    better: str
    ok: bool
    detail: dict[str, object]

    def line(self) -> str:
        """As one JSON object; what the figure was made of stands behind its verdict."""
        members = asdict(self)
        detail = members.pop("detail")
        return json.dumps({**members, **detail}, ensure_ascii=False)


def row(figure: str, value: float, **detail: object) -> Row:
    """The verdict on a value."""
    bound = BOUNDS[figure]
    ok = value <= bound.must if bound.better == "lower" else value >= bound.must
    return Row(figure, round(value, 4), bound.must, bound.aim, bound.better, ok, detail)


def load_rows(samples: Round) -> list[Row]:
    """The figures that are made of the phases' medians."""
    requests, slow, fast, first = (
        samples[phase] for phase in ("requests", "slow_streams", "fast_streams", "first_token")
    )
    failed = {f"{phase}_{name}": one.failed for phase, by in samples.items() for name, one in by.items() if one.failed}
    return [
        _ratio("cpu_per_request_over_nginx", requests, "nginx", "cpu_us"),
        _ratio("requests_per_s_over_direct", requests, "direct", "per_s"),
        _ratio("cpu_per_chunk_over_nginx", slow, "nginx", "cpu_us"),
        _ratio("chunks_per_s_over_direct", fast, "direct", "per_s"),
        row("added_ttft_p50_us", first["gateway"].p50_us - first["nginx"].p50_us, **_each(first, "p50_us")),
        row("failed_operations", sum(failed.values()), failed=failed),
    ]


def _ratio(figure: str, phase: dict[str, Sample], other: str, number: str) -> Row:
    each = _each(phase, number)
    return row(figure, each[f"gateway_{number}"] / max(1e-9, each[f"{other}_{number}"]), **each)


def _each(phase: dict[str, Sample], number: str) -> dict[str, float]:
    each = {f"{name}_{number}": round(float(getattr(sample, number)), 2) for name, sample in phase.items()}
    return each | {"others_share": round(max(sample.others for sample in phase.values()), 3)}


def exit_code(rows: Iterable[Row]) -> int:
    """1 where a must is missed."""
    return 0 if all(one.ok for one in rows) else 1


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/benchmarks.md."""
    lines = ["| figure | value | must | aim |", "| --- | --- | --- | --- |"]
    for one in rows:
        bound = BOUNDS[one.figure]
        sign = "≤" if one.better == "lower" else "≥"
        aim = "" if one.aim is None else f"{sign} {one.aim:g}"
        lines.append(f"| {bound.text} | {one.value:.4g} | {sign} {one.must:g} | {aim} |")
    return "\n".join(lines) + "\n"
