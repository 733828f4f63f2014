"""Runs made up whole, for what reads them: figures, gates, files, reports."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np

from loadtests.recording import ABSENT, PLANNED, SAMPLE, TIERS, Array, Outcome, Run, Samples, Schedule, VersionLife
from loadtests.scenario import Scenario

S: Final = 1_000_000_000
MS: Final = 1_000_000
QUESTION: Final = "Does the made-up server keep its promises?"


@dataclass(frozen=True)
class Shape:
    """What a made-up run looks like; every request is answered alike until `change` has its way."""

    phases: Sequence[str] = ("only",)
    phase_s: float = 10.0
    rate: float = 20.0  # of each group in each phase
    groups: Mapping[str, int] = field(default_factory=lambda: {"all": 2})
    adapters: int = 2  # of each tenant
    ttft_ms: float = 50.0
    chunks: int = 5
    itl_ms: float = 10.0
    slots: int = 4
    seed: int = 1


def run_of(
    shape: Shape = Shape(),
    *,
    gates: Sequence[Mapping[str, Any]] = ({"metric": "error_share", "at_most": 0.0},),
    change: Callable[[Array, Array], None] = lambda _planned, _rows: None,
    **members: Any,
) -> Run:
    """A run of that shape. `change` may write into what was planned and into the samples; `members` are the Run's."""
    tenants = [f"{group}-{number}" for group, count in shape.groups.items() for number in range(count)]
    groups = [group for group, count in shape.groups.items() for _ in range(count)]
    planned = _planned(shape, groups)
    rows, chunk_at = _samples(shape, planned)
    change(planned, rows)
    models = tuple(f"adapter-{number}" for number in range(shape.adapters))
    digests = [f"{tenant}-{model}".encode().hex() for tenant in tenants for model in models]
    schedule = Schedule(planned, tuple(tenants), tuple(groups), models, ("talk",), _spans(shape))
    texts = ("", "base; sha256=0", *(f"1; sha256={digest}" for digest in digests), "replica-0", "overloaded")
    texts += tuple(f"I am {digest}" for digest in digests)
    ends = np.cumsum(np.full(len(rows), shape.chunks)).astype("u8")
    lives = tuple(
        VersionLife(tenant, model, digest, 0, ABSENT, f"I am {digest}")
        for (tenant, model), digest in zip(((t, m) for t in tenants for m in models), digests, strict=True)
    )
    told: dict[str, Any] = {
        "scenario": _scenario(shape, gates),
        "target": {"kind": "fake", "slots": shape.slots, "replicas": 1},
        "machine": {"processor": "made up", "cores": 2},
        "started_at": "2026-11-26T05:00:00+00:00",
        "schedule": schedule,
        "samples": Samples(rows, ends, chunk_at, texts),
        "versions": lives,
    }
    return Run(**told | members)


def with_gates(run: Run, *gates: Mapping[str, Any]) -> Run:
    """The same run with other gates."""
    return replace(run, scenario=run.scenario | {"gates": list(gates)})


def _spans(shape: Shape) -> tuple[tuple[int, int], ...]:
    long = int(shape.phase_s * S)
    return tuple((number * long, (number + 1) * long) for number in range(len(shape.phases)))


def _planned(shape: Shape, groups: Sequence[str]) -> Array:
    random = np.random.default_rng(shape.seed)
    each = round(shape.rate * shape.phase_s)
    parts = []
    for phase, (begin, end) in enumerate(_spans(shape)):
        for group in shape.groups:
            planned = np.zeros(each, PLANNED)
            planned["at"] = np.sort(random.integers(begin, end, each))
            planned["tenant"] = random.choice([n for n, one in enumerate(groups) if one == group], each)
            planned["model"] = random.integers(shape.adapters, size=each) if shape.adapters else ABSENT
            planned["phase"] = phase
            planned["prompt_tokens"], planned["output_tokens"] = 32, shape.chunks
            planned["canary"] = np.arange(each) % 5 == 0
            parts.append(planned)
    planned = np.concatenate(parts)
    for name in ("caller", "conversation", "abort_after", "parameters"):
        planned[name] = ABSENT
    return planned[np.argsort(planned["at"], kind="stable")]


def _samples(shape: Shape, planned: Array) -> tuple[Array, Array]:
    rows = np.zeros(len(planned), SAMPLE)
    rows["index"] = np.arange(len(rows))
    rows["scheduled"] = rows["sent"] = planned["at"]
    rows["headers"] = rows["first"] = rows["sent"] + int(shape.ttft_ms * MS)
    rows["last"] = rows["done"] = rows["first"] + int((shape.chunks - 1) * shape.itl_ms * MS)
    rows["status"], rows["outcome"], rows["tier"] = 200, Outcome.WHOLE, TIERS.index("gpu")
    rows["chunks"] = rows["completion_tokens"] = shape.chunks
    rows["prompt_tokens"], rows["cached_tokens"] = 32, ABSENT
    rows["queue_us"], rows["load_us"] = 200, 0
    number = planned["tenant"] * max(1, shape.adapters) + planned["model"]
    rows["version"] = np.where(planned["model"] == ABSENT, 1, number + 2)
    most = (planned["tenant"].max() + 1) * max(1, shape.adapters)
    rows["replica"] = most + 2
    rows["answer"] = np.where(planned["canary"] & (planned["model"] != ABSENT), most + 4 + number, ABSENT)
    each = (shape.ttft_ms + shape.itl_ms * np.arange(shape.chunks)) * 1e3
    return rows, np.tile(each, len(rows)).astype("u4")


def _scenario(shape: Shape, gates: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    told = {
        "name": "made-up",
        "question": QUESTION,
        "tenants": [{"name": name, "count": count, "adapters": shape.adapters} for name, count in shape.groups.items()],
        "workloads": {"talk": {}},
        "phases": [
            {
                "name": name,
                "duration_s": shape.phase_s,
                "load": [
                    {"tenants": group, "workload": "talk", "arrivals": {"law": "poisson", "rate": shape.rate}}
                    for group in shape.groups
                ],
            }
            for name in shape.phases
        ],
        "gates": list(gates),
    }
    return Scenario.model_validate(told).model_dump(mode="json")
