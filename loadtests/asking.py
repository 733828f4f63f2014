"""What a run's phases ask beside each other: a curve through them means something only if one thing differs."""

import json
from collections import Counter
from typing import Any

import numpy as np

from loadtests.recording import Run
from loadtests.selection import Selected

_MANY_LOADS = ("steps", "ramp")


def no_curve_of_rates(run: Run) -> str:
    """Why no curve goes through this run's rates; empty: the same was asked of it at more than one."""
    phases = _measured(run)
    if len({tuple(sorted((load["tenants"], load["workload"]) for load in phase["load"])) for phase in phases}) > 1:
        return "the phases ask different things, not the same at different rates"
    changes = any(load["arrivals"]["law"] in _MANY_LOADS for phase in phases for load in phase["load"])
    if not changes and len({json.dumps(phase["load"], sort_keys=True) for phase in phases}) < 2:
        return "the run offered one load only"
    return ""


def no_curve_of_adapters(run: Run) -> str:
    """Why no curve goes through this run's numbers of adapters; empty: its phases differ in whose are asked."""
    loads = {
        json.dumps(sorted((load["workload"], json.dumps(load["arrivals"], sort_keys=True)) for load in phase["load"]))
        for phase in _measured(run)
    }
    return "the phases differ in more than in the adapters they ask" if len(loads) > 1 else ""


def tenants_met(chosen: Selected) -> bool:
    """Whether two tenants asked in one phase."""
    asked = np.unique(np.stack([chosen.planned["phase"], chosen.planned["tenant"]]).astype(np.int64), axis=1)
    return max(Counter(asked[0].tolist()).values(), default=0) > 1


def groups_met(run: Run) -> list[str]:
    """The groups of tenants, in the scenario's order, of which two or more asked in one phase; none: they never did."""
    asked = [{load["tenants"] for load in phase["load"]} for phase in run.scenario["phases"]]
    met = set().union(*(groups for groups in asked if len(groups) > 1))
    return [group for group in groups_of(run) if group in met]


def groups_of(run: Run) -> list[str]:
    """All groups of tenants, in the scenario's order."""
    return list(dict.fromkeys(run.schedule.groups))


def _measured(run: Run) -> list[dict[str, Any]]:
    return [phase for phase in run.scenario["phases"] if phase.get("measured", True)]
