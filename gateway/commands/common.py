"""What the command's verbs share: options, clients, how results and failures are told."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from pydantic import ValidationError

from gateway.home import ConfigurationError, Home
from gateway.settings import Settings, explain

if TYPE_CHECKING:
    from gateway.api_client import ApiClient

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Url = Annotated[str | None, typer.Option(envvar="TAILOR_URL", help="Where the gateway is.", show_default=False)]
Key = Annotated[str | None, typer.Option(envvar="TAILOR_API_KEY", help="The tenant's API key.", show_default=False)]
OperatorKey = Annotated[
    str | None,
    typer.Option(
        "--key",
        envvar="TAILOR_OPERATOR_KEY",
        help="An operator's key; default: the one in the home folder.",
        show_default=False,
    ),
]


_opened: ContextVar[ExitStack] = ContextVar("_opened")


@contextmanager
def told() -> Iterator[None]:
    """What a person can mend is told in its own words, without a traceback; connections are closed at the end."""
    from gateway.api_client import ApiError

    try:
        with ExitStack() as opened:
            _opened.set(opened)
            yield
    except (ConfigurationError, ApiError) as error:
        fail(str(error))
    except ValidationError as error:
        fail(explain(error))
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        if not _is_ours(error):
            raise
        fail(str(error))


def _is_ours(error: Exception) -> bool:
    """Errors of the store and of training carry text for the person who made them."""
    return any(kind.__module__.partition(".")[0] in ("adapter_store", "training") for kind in type(error).__mro__)


def fail(message: str) -> NoReturn:
    print(f"tailor: {message}", file=sys.stderr)
    raise typer.Exit(1)


def settings_of(**given: object) -> Settings:
    return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def operator_client(url: str | None, key: str | None) -> "ApiClient":
    """A client with an operator's key, open until `told` ends."""
    from gateway.api_client import ApiClient

    settings = settings_of()
    key = key or Home(settings.home).operator_key()
    if key is None:
        raise ConfigurationError(
            f"No operator key: set TAILOR_OPERATOR_KEY, or run where {settings.home / 'operator-key'} is."
        )
    return _opened.get().enter_context(closing(ApiClient(url or settings.url, key)))


def tenant_client(url: str | None, key: str | None) -> "ApiClient":
    """A client with a tenant's key, open until `told` ends."""
    from gateway.api_client import ApiClient

    if key is None:
        raise ConfigurationError("No API key: set TAILOR_API_KEY or pass --key.")
    return _opened.get().enter_context(closing(ApiClient(url or settings_of().url, key)))


def pages(client: "ApiClient", path: str, last: str) -> list[dict[str, Any]]:
    """All pages of a list; `last` is the member by which the next page is asked for."""
    found: list[dict[str, Any]] = []
    while True:
        after = {"after": found[-1][last]} if found else {}
        page = client.call("GET", path, params={"limit": 1_000, **after})
        found += page["data"]
        if not page["has_more"]:
            return found


def segment(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")


def adapter_path(name: str, *rest: str) -> str:
    """The API's path of an adapter, or of something of it."""
    return "/".join(["/v1/adapters", segment(name), *map(segment, rest)])


def show(result: Any, as_json: bool, text: str) -> None:
    print(json.dumps(result, indent=2) if as_json else text)


def show_table(rows: Any, as_json: bool, columns: tuple[str, ...]) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")  # an id that is cut short is of no use
    for row in rows:
        table.add_row(*(_cell(row.get(column), column) for column in columns))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _cell(value: Any, column: str) -> str:
    if value is None:
        return ""
    if column.endswith("_at"):
        from datetime import UTC, datetime

        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M")
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


@contextmanager
def progress() -> Iterator[Callable[[Any], None]]:
    """A progress bar on standard error, fed with `training.progress.Progress`."""
    from gateway.progress_bar import progress_bar

    with progress_bar() as on_progress:
        yield on_progress
