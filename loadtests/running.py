"""Runs a scenario against a target: prepare, send the schedule while things happen, read the server, clean up."""

import asyncio
import importlib.metadata
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loadtests import results
from loadtests.actions import Actions, check
from loadtests.api import Api, ServerRefused, ServerUnreachable
from loadtests.overhead.processes import machine
from loadtests.playing import Keys, Server, play
from loadtests.preparing import Prepared, off_plans, prepared
from loadtests.progress import Progress
from loadtests.recording import Event, Lateness, Run, Samples, Schedule
from loadtests.scenario import Scenario
from loadtests.scheduling import schedule_of
from loadtests.stacks import Target

_METRIC: Final = re.compile(r"^(tailor_[a-z_]+?)(?:\{[^}]*\})? ([0-9.eE+-]+)$", re.MULTILINE)
INTERRUPTED: Final = "it was interrupted"
LOOK_S: Final = 0.25
_WAITING: Final = ("validating_files", "queued")


@dataclass(frozen=True, slots=True)
class Options:
    """How a run is made; what is said is not about the server."""

    folder: Path
    processes: int = 1
    shard: tuple[int, int] = (0, 1)
    start_at: float | None = None  # seconds of the wall clock
    begun_within_s: float = 60.0
    """After the run, fine-tuning jobs: a worker may be at another one, and loads what it needs with its first."""


class Stop(asyncio.Event):
    """Set, it ends the sending early; what is not sending is ended by its task's cancellation."""

    sending = False


async def run(
    scenario: Scenario,
    target: Target,
    options: Options,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    on_step: Callable[[str], None] = lambda text: None,
    on_left: Callable[[Sequence[str]], None] = lambda left: None,
    stop: Stop | None = None,
) -> Run:
    """The whole run, saved in the options' folder; `on_step` is told what is done now, `stop` ends the sending early.

    `on_left` is told what could not be taken away at the end, by name; a stack of ours goes as a whole.

    Raises:
        ScenarioInvalid: the target cannot do what it asks for. ServerRefused, ServerUnreachable, CannotPlay: nothing
        was measured.
    """
    check(scenario, target)
    schedule = schedule_of(scenario, shard=options.shard)
    stop = stop or Stop()
    of_another = target.kind == "url"
    async with Api(target.url) as api:
        on_step(f"making {len(schedule.tenants)} tenants and {len(schedule.models)} adapters")
        async with prepared(
            scenario,
            schedule,
            api,
            target.operator_key,
            host=options.shard[0],
            on_left=on_left if of_another else _forget,
        ) as made:
            on_step(f"sending {len(schedule.planned)} requests in {schedule.end / 1e9:.0f} s")
            before = await _reading(target, api)
            samples, lateness, actions = await _play(scenario, schedule, target, made, options, on_progress, stop)
            after = await _reading(target, api)
            on_step("asking for the answers of the versions that were published")
            await _learn_the_rest(made)
            found = Run(
                scenario=scenario.model_dump(mode="json"),
                target=await _about(target, made, before),
                machine=machine(),
                started_at=actions.began_at,
                schedule=schedule,
                samples=samples,
                events=(*actions.events, *await _ends_of_jobs(actions, made, schedule.end - 1, options.begun_within_s)),
                versions=made.lives.all(),
                lateness=tuple(lateness),
                unfinished=INTERRUPTED if stop.is_set() else _idle(lateness),
                readings={"before": before, "after": after},
                base_answer=made.base_answer,
                shard=options.shard,
            )
            await asyncio.to_thread(results.save, found, options.folder)  # a broken server may not let us clean up
            return found


def _forget(_: Sequence[str]) -> None:
    pass


async def _play(
    scenario: Scenario,
    schedule: Schedule,
    target: Target,
    made: Prepared,
    options: Options,
    on_progress: Callable[[Progress], None] | None,
    stop: Stop,
) -> tuple[Samples, list[Lateness], Actions]:
    """The schedule, with the actions beside it."""
    keys = Keys([tenant.key for tenant in made.tenants])
    actions = Actions(scenario, target, made, keys)
    over = asyncio.Event()
    beside: list[asyncio.Task[None]] = []

    def begin(at_ns: int) -> None:
        stop.sending = True
        beside.append(asyncio.create_task(actions.run(at_ns, over)))
        beside.append(asyncio.create_task(actions.watch(over)))

    try:
        samples, lateness = await play(
            schedule,
            scenario=scenario,
            server=Server(target.url, made.base.name, made.tokens_per_word),
            keys=keys,
            processes=options.processes,
            folder=options.folder,
            begin_ns=_begin_ns(options.start_at),
            on_begin=begin,
            on_progress=on_progress,
            stop=stop,
        )
    finally:
        stop.sending = False
        over.set()
        done = await asyncio.gather(*beside, return_exceptions=True)
    for error in done:
        if isinstance(error, BaseException):
            raise error
    return samples, lateness, actions


def _idle(lateness: Sequence[Lateness]) -> str:
    """Callers who ask nothing are a smaller load than was meant."""
    idle = sum(one.idle_callers for one in lateness)
    return f"{idle} callers of a closed loop had asked all that was planned before their phase ended" if idle else ""


def _begin_ns(start_at: float | None) -> int | None:
    """A time of the wall clock, which several hosts share, on this one's monotonic clock."""
    return None if start_at is None else time.monotonic_ns() + round((start_at - time.time()) * 1e9)


async def _reading(target: Target, api: Api) -> dict[str, Any]:
    """What the server tells of itself: its replicas, and its metrics summed over their labels."""
    reading: dict[str, Any] = {}
    with suppress(ServerRefused, ServerUnreachable):
        reading["replicas"] = (await api.call(target.operator_key, "GET", "/admin/v1/replicas"))["data"]
    sums: defaultdict[str, float] = defaultdict(float)
    for name, value in _METRIC.findall(await api.text(target.metrics_url) if target.metrics_url else ""):
        sums[name] += float(value)
    return {**reading, "metrics": dict(sums)}


async def _learn_the_rest(made: Prepared) -> None:
    """Answers of versions that came during the run, where they are still there."""
    with suppress(ServerRefused, ServerUnreachable):
        await off_plans(made)
        await made.learn_base()
        await made.learn(
            (tenant, adapter, version)
            for tenant in made.tenants
            for adapter in tenant.adapters
            for version in adapter.versions
        )


async def _ends_of_jobs(actions: Actions, made: Prepared, at: int, within_s: float) -> list[Event]:
    """How the fine-tuning jobs stand after the run, told as of its end; one that nobody has begun is an error."""
    stop, events = time.monotonic() + within_s, []
    for tenant, job in actions.jobs:
        try:
            told = await made.api.call(tenant.key, "GET", f"/v1/fine_tuning/jobs/{job}")
            while told["status"] in _WAITING and time.monotonic() < stop:
                await asyncio.sleep(LOOK_S)
                told = await made.api.call(tenant.key, "GET", f"/v1/fine_tuning/jobs/{job}")
        except (ServerRefused, ServerUnreachable) as error:
            events.append(Event(at, "job", f"{tenant.name}/{job}", error=str(error)))
        else:
            events.append(Event(at, "job", f"{tenant.name}/{job} {told['status']}", error=_fault(told)))
    return events


def _fault(job: Mapping[str, Any]) -> str:
    if job["status"] in _WAITING:
        return "nobody has begun it: does a training worker run?"
    if job["status"] == "failed":
        return str((job.get("error") or {}).get("message") or "it failed")
    return ""


async def _about(target: Target, made: Prepared, reading: dict[str, Any]) -> dict[str, Any]:
    replicas = reading.get("replicas", [])
    return {
        "kind": target.kind,
        "url": target.url,
        "model": made.base.name,
        "fingerprint": made.base.fingerprint,
        "replicas": len(replicas),
        "slots": target.slots,
        "tokens_per_word": made.tokens_per_word,
        "tool": importlib.metadata.version("tailor"),
    }
