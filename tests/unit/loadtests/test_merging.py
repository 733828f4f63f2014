"""Runs of several hosts as the one run that they were."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from loadtests import metrics
from loadtests.merging import CannotMerge, merge
from loadtests.recording import ABSENT, SAMPLE, Event, Lateness, Outcome, Run, Samples, Schedule, VersionLife
from loadtests.scenario import Scenario
from loadtests.scheduling import schedule_of

NAMES = ("adapter-0", "adapter-1")
TOLD: dict[str, Any] = {
    "name": "several-hosts",
    "question": "Are the parts of several hosts one run?",
    "tenants": [{"name": "t", "count": 3, "adapters": 2}],
    "workloads": {"w": {}},
    "phases": [
        {
            "name": "both",
            "duration_s": 5,
            "load": [
                {"tenants": "t", "workload": "w", "arrivals": {"law": "poisson", "rate": 60}},
                {"tenants": "t", "workload": "w", "arrivals": {"law": "constant", "rate": 10}},
                {"tenants": "t", "workload": "w", "arrivals": {"law": "constant", "rate": 20}},
                {"tenants": "t", "workload": "w", "arrivals": {"law": "closed", "callers": 3}},
            ],
        }
    ],
    "gates": [{"metric": "error_share", "at_most": 0}],
}


def played(schedule: Schedule) -> Samples:
    """Samples that tell of what they are: of the row's seed are its times, its chunks and its texts made."""
    planned = schedule.planned
    rows = np.full(len(planned), ABSENT, np.dtype([(name, "i8") for name in SAMPLE.names or ()])).astype(SAMPLE)
    rows["index"] = np.arange(len(planned))
    rows["outcome"], rows["tier"] = Outcome.WHOLE, 0
    rows["sent"] = planned["seed"]
    rows["chunks"] = planned["seed"] % 4
    texts = ("", *sorted({f"replica-{seed % 5}" for seed in planned["seed"]}, reverse=True))
    rows["replica"] = [texts.index(f"replica-{seed % 5}") for seed in planned["seed"]]
    ends = np.cumsum(rows["chunks"].astype(np.uint64))
    return Samples(rows, ends, np.repeat(planned["seed"], rows["chunks"]), texts)


def part(number: int, count: int, **changes: Any) -> Run:
    """What host `number` of `count` brings home."""
    scenario = Scenario.model_validate(TOLD | changes)
    schedule = schedule_of(scenario, shard=(number, count))
    return Run(
        scenario=scenario.model_dump(mode="json"),
        target={"kind": "url", "url": "http://server:8000"},
        machine={"cpu": f"host {number}"},
        started_at=f"2026-11-26T05:00:00.{number}00+00:00",
        schedule=schedule,
        samples=played(schedule),
        events=(Event(1_000 - number, "publish", f"t-0/adapter-{number}"),),
        versions=(VersionLife("t-0", "adapter-0", "digest", 0, ABSENT, "an answer"),),
        lateness=(Lateness(0, 10, 20, 30, 0.5),),
        unfinished="it was interrupted" if number == 1 else "",
        shard=(number, count),
    )


def of_before(run: Run) -> Run:
    """As a version wrote it that did not know when the first token came."""
    rows = run.samples.rows[[name for name in SAMPLE.names or () if name != "token"]]
    return replace(run, samples=replace(run.samples, rows=rows))


def test_merged_parts_are_the_one_run() -> None:
    """Every request stands once, in order of time, with its own times, chunks and texts."""
    alone = part(0, 1)
    together = merge([part(2, 3), part(0, 3), part(1, 3)])
    as_alone = together.schedule.planned.copy()
    as_alone["tenant"] %= 3
    timed, ours = (one[one["at"] != ABSENT] for one in (alone.schedule.planned, as_alone))
    assert ours.tobytes() == timed.tobytes()
    assert {row.tobytes() for row in as_alone} == {row.tobytes() for row in alone.schedule.planned}
    samples = together.samples
    seeds = together.schedule.planned["seed"]
    assert samples.rows["index"].tolist() == list(range(len(seeds)))
    assert samples.rows["sent"].tolist() == seeds.tolist()
    assert samples.chunk_at.tolist() == np.repeat(seeds, seeds % 4).tolist()
    assert samples.chunk_ends.tolist() == np.cumsum(seeds % 4, dtype=np.uint64).tolist()
    assert [samples.texts[place] for place in samples.rows["replica"]] == [f"replica-{seed % 5}" for seed in seeds]


def test_what_hosts_saw_is_kept() -> None:
    """Events in order, each host's versions, each generator's lateness, and which host did not come to its end."""
    together = merge([part(0, 2), part(1, 2)])
    assert [event.target for event in together.events] == ["host-1/t-0/adapter-1", "host-0/t-0/adapter-0"]
    assert [life.tenant for life in together.versions] == ["host-0/t-0", "host-1/t-0"]
    assert [one.process for one in together.lateness] == [0, 1]
    assert together.unfinished == "host 1: it was interrupted"
    assert together.started_at == "2026-11-26T05:00:00.000+00:00"
    assert [one["cpu"] for one in together.machine["hosts"]] == ["host 0", "host 1"]
    assert together.shard == (0, 1)


def test_what_is_not_one_run_is_not_merged() -> None:
    """A part too few, one twice, of another seed or another server: each says so."""
    other = replace(part(1, 2), target={"kind": "url", "url": "http://other:8000"})
    for parts, why in (
        ([], "nothing"),
        ([part(0, 3), part(1, 3)], "the run of each host once"),
        ([part(0, 2), part(0, 2), part(1, 2)], "0/2, 0/2, 1/2"),
        ([part(0, 2), part(1, 3)], "0/2, 1/3"),
        ([part(0, 2), part(1, 2, seed=2)], "another scenario, profile or seed"),
        ([part(0, 2), other], "other:8000"),
        ([part(0, 2), of_before(part(1, 2))], "another version of this tool.*token"),
        ([of_before(part(0, 2)), of_before(part(1, 2))], "Part 0 was written by another version"),
        ([part(0, 2), replace(part(1, 2), started_at="2026-11-26T05:00:06.000+00:00")], "--start-at"),
    ):
        with pytest.raises(CannotMerge, match=why):
            merge(parts)


def test_a_tenant_of_a_merged_run_is_one_at_the_server() -> None:
    """Not the two of the same name: one that is given nothing is seen, and so is an answer of the other's version."""
    both = [part(0, 2), part(1, 2)]
    for host, run in enumerate(both):
        rows, planned = run.samples.rows, run.schedule.planned
        rows["outcome"][(planned["tenant"] == 0) & (host == 0)] = Outcome.REFUSED
        rows["status"], rows["done"] = 200, rows["sent"] + 1
    lives = [
        tuple(
            VersionLife(f"t-{tenant}", name, f"of-{host}", 0, ABSENT, f"{host}")
            for tenant in range(3)
            for name in NAMES
        )
        for host in range(2)
    ]
    texts = [("", "1; sha256=of-0"), ("", "1; sha256=of-1")]
    for host, run in enumerate(both):
        run.samples.rows["version"], run.samples.rows["replica"] = 1, 0
        both[host] = replace(run, versions=lives[host], samples=replace(run.samples, texts=texts[host]))
    together = merge(both)
    assert sorted(together.schedule.tenants) == [f"host-{host}/t-{tenant}" for host in range(2) for tenant in range(3)]
    assert metrics.figure(together, "fairness.least_share").value == 0
    assert metrics.figure(together, "adapters").value == 12
    assert metrics.figure(together, "wrong_adapter").value == 0
    both[1] = replace(both[1], samples=replace(both[1].samples, texts=texts[0]))
    assert metrics.figure(merge(both), "wrong_adapter").value == len(both[1].samples.rows)
