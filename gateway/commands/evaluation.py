"""`tailor eval` and `tailor adapter blend`: how good a model is, and how much of an adapter is best."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.common import Json, Key, Url, settings_of, show, show_table, told
from gateway.home import ConfigurationError

if TYPE_CHECKING:
    from training.metrics import Regression
    from training.scoring import Scored

app = typer.Typer()
REGRESSION = 3
"""The exit status that says so, apart from 1 for what failed and 2 for what was asked wrongly."""


@app.command("eval")
def evaluate(
    data: Annotated[Path, typer.Argument(help="Chat JSONL whose last answers are expected, or preference pairs.")],
    model: Annotated[str, typer.Option(help="Any model that the key may use: name, name:alias, name@3*0.7, ft:…")],
    against: Annotated[
        str | None, typer.Option("--against", "--base", help="Another model: status 3 where the first is worse.")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Questions at a time.")] = 8,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Of an answer; default: the server's.")] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Ask a served model the questions of a file and score its answers: labels, JSON or words, whichever they are."""
    with told():
        import asyncio

        from gateway.api_client import ApiError
        from gateway.served_evaluation import Asker, DataInvalid, read
        from training.scoring import compared, regression_json, scored

        if key is None:
            raise ConfigurationError("No API key: set TAILOR_API_KEY or pass --key.")
        try:
            questions = read(data)
        except DataInvalid as error:
            raise ApiError(str(error)) from error
        expected = [question.expected for question in questions]

        async def ask() -> list[list[str]]:
            asker = Asker(url or settings_of().url, key, concurrency=concurrency, max_tokens=max_tokens)
            return [await asker.answers(name, questions) for name in (model, against) if name is not None]

        answers = asyncio.run(ask())
        found = {name: scored(expected, given) for name, given in zip((model, against), answers, strict=False)}
        regression = compared(expected, answers[1], answers[0]) if against is not None else None
    if as_json:
        models = {str(name): asdict(one) for name, one in found.items()}
        show({"models": models, "regression": regression_json(regression)}, True, "")
    else:
        for name, one in found.items():
            _print(str(name), one)
        _print_regression(model, against, regression)
    if regression is not None and regression.is_regression:
        raise typer.Exit(REGRESSION)


def _print(model: str, found: "Scored") -> None:
    headline, figure = found.headline
    print(f"{model}: {headline} {figure:.3f}, exact match {found.exact_match:.3f} of {found.examples} ({found.kind})")
    if found.classification is not None:
        parts: dict[str, Any] = {**found.classification.by_class, "macro": found.classification.macro}
        first = "class"
    elif found.json_fields is not None:
        parts, first = {**found.json_fields.by_field, "all": found.json_fields.micro}, "field"
    else:
        return
    rows = [
        {
            first: name,
            "precision": f"{one.precision:.3f}",
            "recall": f"{one.recall:.3f}",
            "f1": f"{one.f1:.3f}",
            "support": one.support,
        }
        for name, one in parts.items()
    ]
    show_table(rows, False, (first, "precision", "recall", "f1", "support"))


def _print_regression(model: str, against: str | None, found: "Regression | None") -> None:
    if found is None:
        return
    verdict = "worse by more than chance" if found.is_regression else "not worse by more than chance"
    print(
        f"{model} against {against}: right {found.after:.3f} and {found.before:.3f}, {verdict} (p {found.p_value:.3g})"
    )


def blend(
    adapter: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    base: Annotated[Path, typer.Option(help="Folder of the base model.")],
    task: Annotated[Path, typer.Option(help="Chat JSONL of the adapter's task, held out from its training.")],
    general: Annotated[Path, typer.Option(help="Chat JSONL of what the base can do.")],
    least_task: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Keep this share of the task; default: the smaller of both shares is largest."),
    ] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the curve into this file.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Json = False,
) -> None:
    """Find how much of an adapter keeps most of its task and of what the base could do; then `tailor adapter scale`."""
    with told():
        from gateway.local_training import blend_adapter

        found = blend_adapter(adapter, base, task, general, least_task=least_task, png=png, threads=threads)
    if not as_json:
        rows = [
            {
                "factor": f"{point['factor']:g}",
                "task": f"{point['task']:.3f}",
                "general": f"{point['general']:.3f}",
                "picked": "<" if point == found["picked"] else "",
            }
            for point in found["points"]
        ]
        show_table(rows, False, ("factor", "task", "general", "picked"))
    kept_task, kept_general = found["kept"]
    factor = f"{found['picked']['factor']:g}"
    text = f"{factor} keeps {kept_task:.3f} of the task and {kept_general:.3f} of the rest ({found['rule']})"
    show(found, as_json, f"{text}; next: tailor adapter scale NAME@N {factor}")
