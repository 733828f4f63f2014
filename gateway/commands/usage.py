"""`tailor usage`: what a tenant has used, or for operators every tenant."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gateway.commands.common import Json, Key, Url, operator_client, show_table, tenant_client, told

if TYPE_CHECKING:
    from gateway.api_client import ApiClient

app = typer.Typer()
COUNTS = ("requests", "failed", "prompt_tokens", "cached_tokens", "completion_tokens")
Day = Annotated[datetime | None, typer.Option(formats=["%Y-%m-%d"], help="UTC; default: the running month.")]


@app.command()
def usage(
    by: Annotated[Literal["hour", "day", "month"], typer.Option(help="Length of a row (UTC).")] = "day",
    start: Day = None,
    end: Day = None,
    adapter: Annotated[str | None, typer.Option(help="One adapter alone; '' is the base model.")] = None,
    operator: Annotated[bool, typer.Option("--operator", help="Every tenant, with an operator's key.")] = False,
    tenant: Annotated[str | None, typer.Option(help="With --operator: this tenant's alone.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    url: Url = None,
    key: Key = None,
    operator_key: Annotated[
        str | None,
        typer.Option(envvar="TAILOR_OPERATOR_KEY", help="Default: the one in the home folder.", show_default=False),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the requests and tokens used, by time and adapter."""
    asked = {"by": by, "start": _seconds(start), "end": _seconds(end), "adapter": adapter, "limit": 10_000}
    if tenant is not None and not operator:
        raise typer.BadParameter("--tenant goes with --operator.")
    with told():
        if operator:
            rows = _rows(operator_client(url, operator_key), "/admin/v1/usage", {**asked, "tenant": tenant})
        else:
            rows = _rows(tenant_client(url, key), "/v1/usage", asked)
    who = ("tenant",) if operator else ()
    if as_csv:
        _print_csv(rows, (*(("tenant_id", "tenant") if operator else ()), "start", "adapter", *COUNTS))
    else:
        shown = rows if as_json else [{"from_at": row["start"], **row} for row in rows]
        show_table(shown, as_json, ("from_at", *who, "adapter", *COUNTS))


def _seconds(day: datetime | None) -> int | None:
    return None if day is None else int(day.replace(tzinfo=UTC).timestamp())


def _rows(client: "ApiClient", path: str, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """Every page."""
    parameters = {name: value for name, value in asked.items() if value is not None}
    answer = client.call("GET", path, params=parameters)
    rows: list[dict[str, Any]] = answer["data"]
    while answer["next_page"] is not None:
        answer = client.call("GET", path, params={**parameters, "page": answer["next_page"]})
        rows += answer["data"]
    return rows


def _print_csv(rows: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    from gateway.spreadsheet import csv_of

    typer.echo(csv_of(names, ([row[name] for name in names] for row in rows)), nl=False)
