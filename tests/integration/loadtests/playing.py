"""Small schedules and their playing, for tests of the engine."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loadtests.playing import Keys, Server, play
from loadtests.progress import Progress
from loadtests.recording import ABSENT, PLANNED, Array, Lateness, Samples, Schedule
from loadtests.scenario import Scenario

MS = 1_000_000
NS = 1_000_000_000


def scenario(timeout_s: float = 10.0, **workloads: Mapping[str, Any]) -> Scenario:
    """One group, one phase; the workloads as given, or a plain one."""
    return Scenario.model_validate(
        {
            "name": "small",
            "question": "does the engine do as it is told?",
            "tenants": [{"name": "a"}],
            "workloads": workloads or {"chat": {}},
            "phases": [{"name": "only", "duration_s": 1}],
            "gates": [{"metric": "error_share", "at_most": 0}],
            "timeout_s": timeout_s,
        }
    )


def plan(count: int, *, every_ns: int = MS, **fields: Any) -> Array:
    """Rows a fixed time apart; `fields` are columns of PLANNED."""
    planned = np.zeros(count, PLANNED)
    planned["at"] = np.arange(count) * every_ns
    planned["seed"] = np.arange(count)
    for name in ("caller", "conversation", "abort_after", "parameters"):
        planned[name] = ABSENT
    planned["prompt_tokens"], planned["output_tokens"] = 16, 4
    for name, value in fields.items():
        planned[name] = value
    return planned


def schedule(planned: Array, models: Sequence[str] = ("mock",), workloads: Sequence[str] = ("chat",)) -> Schedule:
    """Of one phase and two tenants in two groups."""
    return Schedule(planned, ("a-0", "b-0"), ("a", "b"), tuple(models), tuple(workloads), ((0, NS),))


async def played(
    port: int,
    told: Schedule,
    folder: Path,
    *,
    of: Scenario | None = None,
    keys: Keys | None = None,
    processes: int = 1,
    connections: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> tuple[Samples, list[Lateness]]:
    """Against a server of this machine."""
    return await play(
        told,
        scenario=of or scenario(),
        server=Server(f"http://127.0.0.1:{port}", "base", connections=connections),
        keys=keys or Keys(["sk-a", "sk-b"]),
        processes=processes,
        folder=folder,
        on_progress=on_progress,
    )
