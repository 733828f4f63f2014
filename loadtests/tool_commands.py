"""Verbs about the tool itself: what this machine's generator can do, and whether another tool sees the same."""

import asyncio
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from loadtests.commands import Stack, cannot, stack_or_target, stopped_by_signals, told
from loadtests.commands import app as app

if TYPE_CHECKING:
    from loadtests.crosschecking import Load
    from loadtests.figures import Row
    from loadtests.playing import Server


INCONCLUSIVE: Final = 3


class Tool(StrEnum):
    """What to compare with."""

    VLLM = "vllm"


@app.command()
def selftest(
    full: Annotated[bool, typer.Option("--full", help="A minute and a half instead of half a one.")] = False,
    report: Annotated[Path | None, typer.Option(help="Write everything to this file, as JSON.")] = None,
) -> None:
    """What this machine's load generator can send, and how wrong its times are. Exit code 1: a figure missed."""
    from loadtests import selftest as measuring

    words = [*([] if full else ["--quick"]), *(["--report", str(report)] if report else [])]
    raise typer.Exit(measuring.main(words))


@app.command()
def crosscheck(
    tool: Annotated[Tool, typer.Argument(help="`vllm`: `vllm bench serve`, which must be installed here.")],
    tokenizer: Annotated[str, typer.Option(help="The base model's, for the other tool: a folder or a name.")],
    target: Annotated[str | None, typer.Option(help="A server that runs: its address. Otherwise: a stack.")] = None,
    api_key: Annotated[str, typer.Option(envvar="TAILOR_API_KEY", help="Of --target.", show_default=False)] = "none",
    model: Annotated[str, typer.Option(help="Of --target: the model's name.")] = "",
    stack: Annotated[Stack, typer.Option(help="Without --target.")] = Stack.FAKE,
    base_model: Annotated[Path | None, typer.Option(help="Of the stack: folder of a base model.")] = None,
    requests: Annotated[int, typer.Option(min=20, help="Of each tool, for each of the two figures of a round.")] = 200,
    rate: Annotated[float, typer.Option(min=0.1, help="Each tool's per second, for the time to first token.")] = 2.0,
    callers: Annotated[int, typer.Option(min=1, help="Each tool's, who wait for their answers: throughput.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=4)] = 64,
    output_tokens: Annotated[int, typer.Option(min=2)] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="In each both tools ask at the same time.")] = 3,
) -> None:
    """Our TTFT p50 and throughput beside another tool's, both asking the server at the same time.

    Exit code 1: more than 5 % off. 3: it was interrupted after something was measured.
    """
    from loadtests.crosschecking import CannotCompare, Load
    from loadtests.figures import exit_code
    from loadtests.folders import own_folder
    from loadtests.playing import Server

    if target is not None and not model:
        cannot("--target needs --model")
    load = Load(requests, rate, callers, prompt_tokens, output_tokens)
    with told(), own_folder() as folder:
        given = None if target is None else (Server(target, model), api_key)
        compared: list[str] = []
        try:
            rows = asyncio.run(_crosscheck(load, given, tokenizer, stack, base_model, rounds, folder, compared))
        except CannotCompare as error:
            cannot(str(error))
        except asyncio.CancelledError:
            if not compared:
                raise
            typer.echo(f"tailor: it was interrupted after {len(compared)} of {2 * rounds} comparisons", err=True)
            raise typer.Exit(INCONCLUSIVE) from None
    raise typer.Exit(exit_code(rows))


async def _crosscheck(
    load: "Load",
    given: tuple["Server", str] | None,
    tokenizer: str,
    stack: Stack,
    base_model: Path | None,
    rounds: int,
    folder: Path,
    compared: list[str],
) -> "list[Row]":
    """The figures; `compared` grows while they are measured."""
    from loadtests.api import Api
    from loadtests.crosschecking import Check
    from loadtests.figures import tell
    from loadtests.playing import Server
    from loadtests.preparing import prepared
    from loadtests.scheduling import schedule_of

    def seen(text: str) -> None:
        compared.append(text)
        typer.echo(text, err=True)

    async def rows(check: Check) -> "list[Row]":
        found = []
        async for one in check.rows(rounds, seen):
            tell([one])
            found.append(one)
        return found

    stopped_by_signals()
    if given is not None:
        return await rows(Check(*given, tokenizer, load, folder))
    plain = load.scenario(paced=True, seed=1)
    async with (
        stack_or_target(plain, None, stack, base_model, folder) as target,
        Api(target.url) as api,
        prepared(plain, schedule_of(plain), api, target.operator_key) as made,
    ):
        server = Server(target.url, made.base.name, made.tokens_per_word)
        return await rows(Check(server, made.tenants[0].key, tokenizer, load, folder))
