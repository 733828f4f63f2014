"""`tailor loadtest`: the verbs that read what runs left, or what was recorded elsewhere; `app` has all verbs."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loadtests.commands import cannot, judge, told
from loadtests.tool_commands import app as app

if TYPE_CHECKING:
    from loadtests.comparing import Compared

trace_app = typer.Typer(
    help="Recorded traffic: read the files of others, write files for others.", no_args_is_help=True
)
app.add_typer(trace_app, name="trace")

RunFolder = Annotated[Path, typer.Argument(help="Folder of a run's results.")]


class Form(StrEnum):
    """Whose file it is."""

    AZURE = "azure"
    BURSTGPT = "burstgpt"
    MOONCAKE = "mooncake"
    VLLM = "vllm"


@trace_app.command("import")
def import_trace(
    form: Annotated[Form, typer.Argument(help="What the file is.")],
    file: Path,
    out: Annotated[Path, typer.Argument(help="The trace file to write, JSONL; a scenario names it.")],
    from_s: Annotated[float, typer.Option(help="Leave out what is earlier, in s since the first request.")] = 0.0,
    until_s: Annotated[float | None, typer.Option(help="Leave out what is later.")] = None,
) -> None:
    """Read a published trace: when requests came, and how many tokens went in and out."""
    from loadtests import trace_formats, traces

    with told():
        until = float("inf") if until_s is None else until_s
        found = trace_formats.load(file, form, from_s=from_s or float("-inf"), until_s=until)
        traces.write(found, out)
    lasts_s = float(found.at_s[-1])
    rate = f", {len(found.at_s) / lasts_s:.3g} a second" if lasts_s else ""
    typer.echo(f"{out}: {len(found.at_s)} requests in {lasts_s:.0f} s{rate}")


@trace_app.command("export")
def export_trace(
    form: Annotated[Form, typer.Argument(help="For whom.")],
    source: Annotated[Path, typer.Argument(help="A trace file, or the folder of a run: what it was to send.")],
    out: Path,
) -> None:
    """Write a trace, or a run's schedule, for another tool."""
    from loadtests import results, trace_formats, traces

    with told():
        found = traces.recorded(results.load(source).schedule) if source.is_dir() else traces.read(source)
        trace_formats.dump(found, out, form)
    typer.echo(f"{out}: {len(found.at_s)} requests")


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(help="Folder for the whole run.")],
    parts: Annotated[list[Path], typer.Argument(help="Folders of the runs with --shard 0/n, 1/n, …")],
) -> None:
    """Put the runs of several hosts together and judge them as one. Exit code as that of `run`."""
    from loadtests import merging, results

    with told():
        try:
            whole = merging.merge([results.load(part) for part in parts])
        except merging.CannotMerge as error:
            cannot(str(error))
        results.save(whole, out)
        raise typer.Exit(judge(whole, out, None))


@app.command()
def compare(
    before: RunFolder,
    after: RunFolder,
    tolerance: Annotated[float, typer.Option(min=0, help="Less than this share of a figure is no change.")] = 0.05,
    fail: Annotated[bool, typer.Option("--fail", help="Exit code 1 where a figure is worse, chance apart.")] = False,
) -> None:
    """Two runs beside each other: what is better, what is worse, and what may be chance.

    With --fail, exit code 3 where a run proves nothing or the two are of different loads.
    """
    from loadtests import comparing, gates, results

    with told():
        first, second = results.load(before), results.load(after)
        found = list(comparing.compare(first, second, tolerance=tolerance))
        for line in comparing.differences(first, second):
            typer.echo(f"not the same: {line}")
    _show(found)
    doubts = [*gates.doubts_of(second), *gates.doubts_of_baseline(second, first)]
    for doubt in doubts:
        typer.echo(doubt)
    if fail and doubts:
        raise typer.Exit(gates.INCONCLUSIVE)
    if fail and any(one.change is comparing.Change.WORSE for one in found):
        raise typer.Exit(1)


def _show(found: "list[Compared]") -> None:
    import sys

    from rich.console import Console
    from rich.table import Table

    colours = {"better": "green", "worse": "red", "may be chance": "yellow"}
    table = Table("phase", "figure", "before", "after", "ratio", "95 % interval", "", box=None, pad_edge=False)
    for one in found:
        interval = "" if one.interval is None else f"{one.interval[0]:.3g} to {one.interval[1]:.3g}"
        change = f"[{colours.get(one.change, 'default')}]{one.change}[/]"
        figures = (f"{one.before:.4g}", f"{one.after:.4g}", f"{one.ratio:.3g}")
        table.add_row(one.phase or "all measured", one.metric, *figures, interval, change)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
