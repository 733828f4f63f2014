"""From samples to verdicts: the figures and their bounds."""

from typing import Final

from loadtests.figures import Bound, Row
from loadtests.overhead.phases import Round, Sample

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
    "resolve_admit_cpu_ratio": Bound(
        1.10, None, "lower", "CPU of resolve + admit, requests for ten of 100,000 adapters ÷ of 10"
    ),
    "request_cpu_ratio": Bound(
        1.25, 1.10, "lower", "CPU of a request, spread over 2,000 of 100,000 adapters ÷ over 10"
    ),
    "resolve_admit_rss_mib": Bound(
        150, None, "lower", "resident memory of 100,000 adapters, 10,000 tenants, 20,000 keys, MiB"
    ),
    "body_1mb_cpu_ms": Bound(3, None, "lower", "event loop of a 1 MB body, worst of the ordinary shapes, ms"),
    "failed_operations": Bound(0, None, "lower", "requests that failed, all targets"),
    "features_off": Bound(0, None, "lower", "parts of the gateway that did not take part"),
}


def row(figure: str, value: float, **detail: object) -> Row:
    """The verdict on a value."""
    return Row(figure, value, BOUNDS[figure], detail)


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
