"""The runs of several hosts that shared one schedule (`--shard i/n --start-at`) as the one run that they were.

Each host's times are since its own begin. Those begins are one moment as far as the hosts' clocks agree, which is what
a time of the merged run is true to; times within a request are one host's and as exact as ever.

Each host had tenants of its own at the server, of the same names: in the merged run they are as many as there were,
each named after its host, so that what is said of a tenant or an adapter is of one.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Final

import numpy as np
import numpy.typing as npt

from loadtests.recording import PLANNED, SAMPLE, Array, Run, Samples, Schedule
from loadtests.records import merged
from loadtests.scheduling import order_of

APART: Final = timedelta(seconds=1)
"""The hosts' clocks may be so far apart; parts that were run one after the other were never one load."""


class CannotMerge(Exception):
    """Runs that are not parts of one; the text says why."""


def merge(runs: Sequence[Run]) -> Run:
    """The parts of a run, in any order, as a whole.

    Raises:
        CannotMerge: one is missing, is there twice, ran at another time, or is of another scenario or target.
    """
    parts = [_named_after_host(part) for part in _parts(runs)]
    first = parts[0]
    schedule, places = _schedule(parts)
    return replace(
        first,
        machine={**first.machine, "hosts": [part.machine for part in parts]},
        started_at=min(part.started_at for part in parts),
        schedule=schedule,
        samples=merged([_placed(part.samples, own) for part, own in zip(parts, places, strict=True)]),
        events=tuple(sorted((event for part in parts for event in part.events), key=lambda event: event.at)),
        versions=tuple(life for part in parts for life in part.versions),
        lateness=tuple(
            replace(one, process=number) for number, one in enumerate(one for part in parts for one in part.lateness)
        ),
        unfinished="; ".join(f"host {n}: {part.unfinished}" for n, part in enumerate(parts) if part.unfinished),
        readings={**first.readings, "hosts": [part.readings for part in parts]},
        base_answer=next((part.base_answer for part in parts if part.base_answer is not None), None),
        shard=(0, 1),
    )


def _parts(runs: Sequence[Run]) -> list[Run]:
    """In order of their shards."""
    if not runs:
        raise CannotMerge("There is nothing to merge.")
    first, parts = runs[0], sorted(runs, key=lambda run: run.shard)
    count = first.shard[1]
    found = [run.shard for run in parts]
    if found != [(number, count) for number in range(count)]:
        told = ", ".join(f"{place}/{of}" for place, of in found)
        raise CannotMerge(f"The parts are {told}: give the run of each host once.")
    begins = [datetime.fromisoformat(run.started_at) for run in parts]
    if max(begins) - min(begins) > APART:
        apart_s = (max(begins) - min(begins)).total_seconds()
        raise CannotMerge(f"The parts began {apart_s:.1f} s apart: run them at once, with the same --start-at.")
    for run in parts:
        if strange := _strange(run):
            raise CannotMerge(
                f"Part {run.shard[0]} was written by another version of this tool, which tells more or less of a "
                f"request ({strange}): run every host's with this one."
            )
        if run.scenario != first.scenario:
            raise CannotMerge(f"Part {run.shard[0]} is of another scenario, profile or seed than part 0.")
        if run.target.get("url") != first.target.get("url"):
            raise CannotMerge(f"Part {run.shard[0]} asked {run.target.get('url')}, part 0 {first.target.get('url')}.")
    return parts


def _strange(run: Run) -> str:
    """What its samples or its schedule tell that ours do not, or the other way round."""
    told = {*(run.samples.rows.dtype.names or ()), *(run.schedule.planned.dtype.names or ())}
    return ", ".join(sorted(told ^ {*(SAMPLE.names or ()), *(PLANNED.names or ())}))


def _named_after_host(part: Run) -> Run:
    """With all hosts' tenants in its schedule, and its own the ones that asked."""
    (host, count), schedule = part.shard, part.schedule
    names = set(schedule.tenants)

    def own(target: str) -> str:
        return _of_host(host, target) if target.split("/")[0] in names else target

    planned = schedule.planned.copy()
    planned["tenant"] += host * len(schedule.tenants)
    return replace(
        part,
        schedule=replace(
            schedule,
            planned=planned,
            tenants=tuple(_of_host(number, name) for number in range(count) for name in schedule.tenants),
            groups=schedule.groups * count,
        ),
        versions=tuple(replace(life, tenant=_of_host(host, life.tenant)) for life in part.versions),
        events=tuple(replace(event, target=own(event.target)) for event in part.events),
    )


def _of_host(host: int, name: str) -> str:
    return f"host-{host}/{name}"


def _schedule(parts: Sequence[Run]) -> tuple[Schedule, list[npt.NDArray[np.int64]]]:
    """The whole schedule, and where in it each row of each part is."""
    together: Array = np.concatenate([part.schedule.planned for part in parts])
    order = order_of(together, parts[0].schedule.phases)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    ends = np.cumsum([len(part.schedule.planned) for part in parts])
    return replace(parts[0].schedule, planned=together[order]), np.split(place, ends[:-1])


def _placed(samples: Samples, places: npt.NDArray[np.int64]) -> Samples:
    """Samples whose index is that of the whole schedule."""
    rows = samples.rows.copy()
    rows["index"] = places[rows["index"]]
    return replace(samples, rows=rows)
