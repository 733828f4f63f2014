"""`tailor loadtest sweep` and `plan`: where the knee is, and what a peak needs."""

import asyncio
import json
import math
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from loadtests.commands import (
    Chosen,
    OperatorKey,
    Out,
    Profile,
    ScenarioName,
    Url,
    cannot,
    fault_written,
    judge,
    one_of,
    operator_key_of,
    say_left,
    stack_or_target,
    stopped_by_signals,
    told,
)
from loadtests.reading_commands import RunFolder
from loadtests.reading_commands import app as app

if TYPE_CHECKING:
    from loadtests.fitting import Room
    from loadtests.planning import Plan, Traffic
    from loadtests.recording import Run
    from loadtests.scenario import Objective, Scenario

INCONCLUSIVE = 3


@app.command()
def sweep(
    scenario: ScenarioName,
    first: Annotated[float, typer.Option("--from", min=0.01, help="The first rate, requests per second.")],
    most: Annotated[float, typer.Option("--to", min=0.01, help="No rate above it is tried.")] = 1_000.0,
    profile: Profile = "full",
    phase: Annotated[str | None, typer.Option(help="Whose load is swept; default: the first measured.")] = None,
    duration_s: Annotated[float | None, typer.Option(min=1, help="Of each rate; default: the phase's.")] = None,
    warm_up_s: Annotated[float, typer.Option(min=0, help="Before each, not measured.")] = 3.0,
    goal: Annotated[float, typer.Option(min=0, max=1, help="Share of the requests to keep the objective.")] = 0.9,
    within: Annotated[float, typer.Option(min=0.01, help="How closely the knee is to be known.")] = 0.1,
    target: Url = None,
    stack: Chosen = None,
    operator_key: OperatorKey = None,
    slots: Annotated[int, typer.Option(min=0, help="Of --target: max_loras of a replica.")] = 0,
    base_model: Annotated[Path | None, typer.Option(help="Of --stack: folder of a base model.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Generator processes.")] = 1,
    out: Out = None,
) -> None:
    """Rate after rate up to the knee, where too few requests keep the objective; one run with a phase for each rate.

    Exit code 1: answers of a wrong adapter, or errors. 3: a generator was late, the knee is not between the rates, or
    it was interrupted.
    """
    from loadtests import results, sweeping
    from loadtests import scenario as scenarios
    from loadtests.points import knee_of, points_of
    from loadtests.running import INTERRUPTED, Options, run
    from loadtests.stacks import UrlTarget

    async def swept(wanted: "Scenario", folder: Path, runs: "list[Run]") -> None:
        given = None if target is None else UrlTarget(target, operator_key_of(operator_key), slots=slots)
        stop = stopped_by_signals()
        async with stack_or_target(wanted, given, stack, base_model, folder) as found:

            async def measure(made: "Scenario") -> "Run":
                each = folder / made.phases[-1].name
                await asyncio.to_thread(each.mkdir, parents=True, exist_ok=True)
                one = await run(made, found, Options(each, processes), on_left=say_left, stop=stop)
                for point in points_of(one):
                    typer.echo(_line(point), err=True)
                return one

            points = sweeping.sweep(
                measure,
                wanted,
                first=first,
                most=most,
                level=goal,
                within=within,
                phase=phase,
                duration_s=duration_s,
                warm_up_s=warm_up_s,
            )
            async for one in points:
                runs.append(one)

    with fault_written(out, Path(scenario).stem), told():
        wanted = scenarios.read(Path(scenario), profile=profile)
        one_of(target, stack)
        folder = out or Path("loadtest-results") / f"sweep-{wanted.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder.mkdir(parents=True, exist_ok=True)
        runs: list[Run] = []
        unfinished = ""
        try:
            asyncio.run(swept(wanted, folder, runs))
        except sweeping.SweepInconclusive as error:
            unfinished = str(error)
        except asyncio.CancelledError:
            if not runs:
                raise
            unfinished = INTERRUPTED
        if not runs:
            typer.echo(f"tailor: {unfinished}; what was measured is in {folder}", err=True)
            raise typer.Exit(INCONCLUSIVE)
        whole = replace(sweeping.joined(runs), unfinished=unfinished)
        points = points_of(whole)
        knee = knee_of(points, goal)
        (folder / "sweep.json").write_text(json.dumps(sweeping.told(points, knee), indent=1))
        results.save(whole, folder)
        code = judge(whole, folder, None)
    typer.echo("\n".join(_line(point) for point in points))
    if unfinished:
        typer.echo(f"the knee was not found: {unfinished}")
        raise typer.Exit(code)
    if math.isnan(knee.rate) or not knee.reached:
        below = f"below {points[0].offered:.4g} requests/s: --from is too high"
        above = f"above {points[-1].offered:.4g} requests/s: --to is too low"
        typer.echo(f"the knee is {below if knee.reached else above}")
        raise typer.Exit(code or INCONCLUSIVE)
    typer.echo(f"knee: {knee.rate:.4g} requests/s")
    raise typer.Exit(code)


def _line(point: Any) -> str:
    return (
        f"{point.offered:8.3g} requests/s offered: {point.kept_share:4.0%} keep the objective, {point.rate:.3g}/s "
        f"answered, TTFT p50 {point.ttft_p50_ms:.0f} ms, p99 {point.ttft_p99_ms:.0f} ms"
    )


@app.command()
def plan(
    run: RunFolder,
    peak: Annotated[float, typer.Option(min=0.01, help="Requests per second at the peak.")],
    goal: Annotated[float, typer.Option(min=0, max=1, help="Share of the requests to keep the objective.")] = 0.9,
    slots: Annotated[str, typer.Option(help="Numbers of slots to look at, as 4,8,16; default: as measured.")] = "",
    adapters: Annotated[int | None, typer.Option(min=1, help="Default: as measured.")] = None,
    zipf: Annotated[float | None, typer.Option(min=0, help="Exponent of their popularity; 0 is even.")] = None,
    ttft_ms: Annotated[float | None, typer.Option(help="Objective; default: the scenario's.")] = None,
    tpot_ms: Annotated[float | None, typer.Option(help="Objective.")] = None,
    response_ms: Annotated[float | None, typer.Option(help="Objective.")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Of a replica, where the run does not say.")] = None,
    host_adapters: Annotated[int | None, typer.Option(min=1, help="max_cpu_loras, likewise.")] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write it to this file too.")] = None,
) -> None:
    """Replicas and slots for a peak, reckoned from a run at several rates (`sweep`), with all that this assumes.

    Exit code 2: the run does not tell it. 3: no number of replicas up to 64 keeps the goal.
    """
    from loadtests import planning, results
    from loadtests.fitting import CannotFit

    with told():
        found = results.load(run)
        room = _room(found, max_num_seqs, host_adapters)
        traffic = _traffic(found, adapters, zipf)
        wanted = [int(one) for one in slots.split(",")] if slots else [room.slots]
        objective = _objective(found, ttft_ms=ttft_ms, tpot_ms=tpot_ms, response_ms=response_ms)
        try:
            model = planning.Model(found, room, objective, goal=goal, traffic=traffic)
        except CannotFit as error:
            cannot(str(error))
        made = planning.plan(model, peak, goal=goal, slots=wanted)
    if as_json is not None:
        as_json.write_text(json.dumps(asdict(made), indent=1))
    _show(made)
    if not any(option.enough for option in made.options):
        raise typer.Exit(INCONCLUSIVE)


def _room(run: "Run", max_num_seqs: int | None, host_adapters: int | None) -> "Room":
    """Of a stack as its scenario says, of another server as far as it told and we are told."""
    from loadtests.fitting import Room

    stack = run.scenario.get("stack", {}) if run.target.get("kind") in ("fake", "cpu") else {}
    slots = int(stack.get("slots") or run.target.get("slots") or 0)
    sequences = max_num_seqs or stack.get("max_num_seqs")
    if not slots or not sequences:
        cannot("the run does not tell its server's room: run with --slots, and say --max-num-seqs here")
    return Room(slots, host_adapters or int(stack.get("host_adapters") or slots), int(sequences))


def _traffic(run: "Run", adapters: int | None, zipf: float | None) -> "Traffic":
    from loadtests.planning import Traffic
    from loadtests.scenario import Zipf

    if adapters is not None and zipf is None:
        cannot("--adapters needs --zipf: another number of adapters has another popularity")
    return Traffic(adapters, None if zipf is None else Zipf(law="zipf", exponent=zipf))


def _objective(run: "Run", **told_here: float | None) -> "Objective":
    from loadtests.scenario import Objective

    said = {name: value for name, value in told_here.items() if value is not None}
    return Objective.model_validate((run.scenario.get("objective") or {}) | said)


def _show(made: "Plan") -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table(
        "replicas", "slots each", f"keep at {made.peak:g}/s", "knee /s", "hit ratio", "", box=None, pad_edge=False
    )
    for option in made.options:
        verdict = "[green]enough[/]" if option.enough else "[red]too few[/]"
        mark = " extrapolated" if option.extrapolated else ""
        figures = (f"{option.kept_share:.1%}", f"{option.knee:.3g}", f"{option.hit_ratio:.2f}")
        table.add_row(str(option.replicas), str(option.slots), *figures, verdict + mark)
    console.print(table)
    console.print("\nThis assumes:")
    for line in made.assumptions:
        console.print(f"- {line}", highlight=False)
    beyond = {line: None for option in made.options for line in option.extrapolated}
    if beyond:
        console.print("Extrapolated beyond what was measured:")
        for line in beyond:
            console.print(f"- {line}", highlight=False)
