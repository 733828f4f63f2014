"""`tailor loadtest`: its verbs. Each imports its part only when it runs."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, NoReturn

import typer

if TYPE_CHECKING:
    from loadtests.recording import Run
    from loadtests.running import Options, Stop
    from loadtests.scenario import Scenario
    from loadtests.stacks import Target

app = typer.Typer(help="Load tests that tell whether a server keeps what it promises.", no_args_is_help=True)

CANNOT: Final = 2
"""Exit code: bad configuration, or nobody to test."""


class Stack(StrEnum):
    """What `--stack` starts."""

    FAKE = "fake"
    CPU = "cpu"


ScenarioName = Annotated[str, typer.Argument(help="A shipped scenario's name, or a YAML file.")]
Profile = Annotated[str, typer.Option(help="`short` is for CI.")]
Url = Annotated[str | None, typer.Option("--target", envvar="TAILOR_URL", help="A server that runs: its address.")]
Chosen = Annotated[Stack | None, typer.Option("--stack", help="Start one for the run alone.")]
OperatorKey = Annotated[
    str | None,
    typer.Option(envvar="TAILOR_OPERATOR_KEY", help="Of --target; default: TAILOR_HOME's.", show_default=False),
]
Out = Annotated[Path | None, typer.Option(help="Folder for the results; default: loadtest-results/<scenario>-<time>.")]


@app.command("list")
def list_scenarios() -> None:
    """The shipped scenarios, and which question each answers."""
    from rich.console import Console
    from rich.table import Table

    from loadtests.scenario import SHIPPED, read

    table = Table("scenario", "question", box=None, pad_edge=False)
    for path in sorted(SHIPPED.glob("*.yaml")):
        with told():
            table.add_row(path.stem, read(path).question)
    Console().print(table)


@app.command()
def run(
    scenario: ScenarioName,
    profile: Profile = "full",
    target: Url = None,
    stack: Chosen = None,
    operator_key: OperatorKey = None,
    metrics: Annotated[str, typer.Option(help="Of --target: address of its /metrics.")] = "",
    slots: Annotated[int, typer.Option(min=0, help="Of --target: max_loras of a replica.")] = 0,
    base_model: Annotated[Path | None, typer.Option(help="Of --stack: folder of a base model.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="Generator processes.")] = 1,
    out: Out = None,
    baseline: Annotated[Path | None, typer.Option(help="Folder of an earlier run to compare with.")] = None,
    shard: Annotated[str, typer.Option(help="i/n: one of n hosts' share, from 0.")] = "0/1",
    start_at: Annotated[float | None, typer.Option(help="Unix time, for several hosts.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="No live display.")] = False,
) -> None:
    """Run a scenario. Exit code: 0 gates kept, 1 one failed, 2 it could not be run, 3 inconclusive."""
    from loadtests.running import Options
    from loadtests.scenario import read
    from loadtests.stacks import UrlTarget

    with fault_written(out, Path(scenario).stem), told():
        wanted = read(Path(scenario), profile=profile)
        one_of(target, stack)
        folder = out or Path("loadtest-results") / f"{wanted.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        folder.mkdir(parents=True, exist_ok=True)
        options = Options(folder, processes, _shard(shard), start_at)
        given = None if target is None else UrlTarget(target, operator_key_of(operator_key), metrics, slots=slots)
        found = asyncio.run(_run(wanted, given, stack, base_model, options, quiet=quiet))
        code = judge(found, folder, baseline)
    raise typer.Exit(code)


@app.command("report")
def report_again(
    folder: Annotated[Path, typer.Argument(help="Of a run's results.")],
    baseline: Annotated[Path | None, typer.Option(help="Folder of an earlier run to compare with.")] = None,
) -> None:
    """Judge a run again and write its report anew. Exit code as of `run`."""
    from loadtests import results

    with told():
        code = judge(results.load(folder), folder, baseline)
    raise typer.Exit(code)


async def _run(
    scenario: "Scenario",
    given: "Target | None",
    stack: Stack | None,
    base_model: Path | None,
    options: "Options",
    *,
    quiet: bool,
) -> "Run":
    from loadtests.live import Display
    from loadtests.running import run as run_scenario

    stop = stopped_by_signals()
    async with stack_or_target(scenario, given, stack, base_model, options.folder) as target:
        if quiet:
            return await run_scenario(scenario, target, options, on_left=say_left, stop=stop)
        with Display(scenario) as display:
            return await run_scenario(
                scenario, target, options, on_progress=display, on_step=_say, on_left=say_left, stop=stop
            )


def stopped_by_signals() -> "Stop":
    """Ctrl-C, or the SIGTERM of a CI whose time is up: while requests are sent it ends that, otherwise all."""
    from loadtests.running import Stop

    task, stop, loop = asyncio.current_task(), Stop(), asyncio.get_running_loop()
    assert task is not None

    def interrupt(task: asyncio.Task[object] = task) -> None:
        if stop.sending and not stop.is_set():
            stop.set()
        else:
            task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, interrupt)
    return stop


@asynccontextmanager
async def stack_or_target(
    scenario: "Scenario", given: "Target | None", stack: Stack | None, base_model: Path | None, folder: Path
) -> "AsyncIterator[Target]":
    """What is tested: the one that is given, or a stack started for it; files in `folder`."""
    from loadtests.cpu_stack import cpu_stack
    from loadtests.fake_stack import fake_stack

    if given is not None:
        yield given
        return
    trains = scenario.stack.worker
    base = base_model or (_tiny_base() if stack is Stack.CPU or trains else None)
    _say(f"starting the stack; logs are in {folder / 'stack'}")
    if stack is Stack.CPU:
        assert base is not None
        async with cpu_stack(scenario.stack, folder / "stack", base=base) as cpu:
            yield cpu
    else:
        async with fake_stack(scenario.stack, folder / "stack", base=base) as fake:
            yield fake


def _tiny_base() -> Path:
    """A small base, built once with what `tailor` has for that and kept in the home's cache."""
    base = _home() / "cache" / "loadtest" / "tiny-base"
    if not base.exists():
        base.parent.mkdir(parents=True, exist_ok=True)
        _say("building a tiny base model (once)")
        command = [sys.executable, "-m", "gateway.cli", "base", "tiny", "--out", str(base)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            cannot(f"no base model: {done.stderr.strip()[-500:]}")
    return base.resolve()


def judge(found: "Run", folder: Path, baseline: Path | None) -> int:
    """The verdicts on a run that was saved in the folder, told and written there."""
    from rich.console import Console

    from loadtests import gates, report, results

    verdicts = gates.judge(found, results.load(baseline) if baseline is not None else None)
    results.write(found, verdicts, folder)
    page = report.write(found, verdicts, folder)
    console = Console()
    for one in verdicts:
        colour = {"pass": "green", "fail": "red"}.get(one.judgement, "yellow")
        console.print(f"[{colour}]{one.judgement:12}[/] {one.gate}: {one.reason}", highlight=False, soft_wrap=True)
    console.print(f"results are in {folder}, the report is {page}", highlight=False, soft_wrap=True)
    return gates.exit_code(verdicts, found)


def one_of(target: str | None, stack: Stack | None) -> None:
    """Exit where there is nothing to test, or two things."""
    if (target is None) == (stack is None):
        cannot("say either --target URL, or --stack fake or cpu")


def _shard(text: str) -> tuple[int, int]:
    try:
        place, count = (int(part) for part in text.split("/"))
    except ValueError:
        cannot(f"--shard {text}: it is written i/n, such as 0/2")
    if not 0 <= place < count:
        cannot(f"--shard {text}: i goes from 0 to n - 1")
    return place, count


def operator_key_of(given: str | None) -> str:
    """The one that is given, or that of this machine's server."""
    file = _home() / "operator-key"
    if given is not None:
        return given
    if not file.exists():
        cannot(f"no operator key: set TAILOR_OPERATOR_KEY, or run where {file} is")
    return file.read_text().strip()


def _home() -> Path:
    return Path(os.environ.get("TAILOR_HOME", ".tailor"))


@contextmanager
def told() -> Iterator[None]:
    """What a person can mend is told without a traceback, with exit code 2."""
    from loadtests.api import ServerRefused, ServerUnreachable
    from loadtests.children import StackFailed
    from loadtests.playing import CannotPlay
    from loadtests.results import ResultsUnreadable
    from loadtests.scenario import ScenarioInvalid

    mendable = (ScenarioInvalid, ResultsUnreadable, ServerRefused, ServerUnreachable, StackFailed, CannotPlay, OSError)
    try:
        yield
    except mendable as error:
        cannot(str(error))
    except asyncio.CancelledError:
        cannot("it was interrupted; `tailor loadtest report` judges what its folder has, if it has a run")


class _Cannot(typer.Exit):
    """The end of a command that could not do what it was asked."""

    def __init__(self, text: str) -> None:
        super().__init__(CANNOT)
        self.text = text


def cannot(text: str) -> NoReturn:
    """Say why there is nothing to judge."""
    typer.echo(f"tailor: {text}", err=True)
    raise _Cannot(text)


@contextmanager
def fault_written(folder: Path | None, name: str) -> Iterator[None]:
    """A folder that is used again has no earlier run's verdicts, and says so where this one could not be run."""
    from loadtests import results

    with told():
        if folder is not None:
            results.clear(folder)
    try:
        yield
    except _Cannot as error:
        if folder is not None:
            with suppress(OSError):
                results.write_fault(folder, name, error.text)
        raise


def say_left(left: Sequence[str]) -> None:
    """What a load test could not take away at the server."""
    _say("left at the server, for it could not be cleaned:")
    for line in left:
        _say(f"  {line}")


def _say(text: str) -> None:
    typer.echo(text, err=True)
