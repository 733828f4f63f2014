"""`tailor quarantine`: adapters that are held back, for operators."""

from typing import Annotated

import typer

from gateway.commands.common import Json, OperatorKey, Url, operator_client, segment, show, show_table, told

app = typer.Typer(help="Adapters that are held back (with an operator's key).", no_args_is_help=True)
PATH = "/admin/v1/quarantine"
COLUMNS = ("id", "reason", "strikes", "tenant_id", "digest", "replica", "at", "until")


@app.command("list")
def list_held(url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """List the adapters that no engine may load just now, with the reason."""
    with told():
        found = operator_client(url, key).call("GET", PATH)["data"]
    show_table(found, as_json, COLUMNS)


@app.command("lift")
def lift(
    held: Annotated[str, typer.Argument(help="The id, from `tailor quarantine list`.")],
    url: Url = None,
    key: OperatorKey = None,
    as_json: Json = False,
) -> None:
    """Let an adapter be loaded again."""
    with told():
        operator_client(url, key).call("DELETE", f"{PATH}/{segment(held)}")
    show({"id": held, "lifted": True}, as_json, f"{held} may be loaded again")
