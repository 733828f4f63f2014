"""`tailor key`: API keys."""

import asyncio
from typing import Annotated, Any

import typer

from gateway.commands.common import (
    Json,
    OperatorKey,
    Url,
    operator_client,
    segment,
    settings_of,
    show,
    show_table,
    told,
)
from gateway.home import Home

app = typer.Typer(help="API keys of tenants (with an operator's key).", no_args_is_help=True)


@app.command("create")
def key_create(
    tenant: str,
    label: Annotated[str, typer.Option(help="What it is for.")] = "",
    scope: Annotated[list[str] | None, typer.Option(help="inference, adapters; default: both.")] = None,
    url: Url = None,
    key: OperatorKey = None,
    as_json: Json = False,
) -> None:
    """Make a key for a tenant. It is shown this once."""
    body: dict[str, Any] = {"label": label}
    if scope:
        body["scopes"] = scope
    with told():
        made = operator_client(url, key).call("POST", f"/admin/v1/tenants/{segment(tenant)}/keys", body)
    show(made, as_json, f"{made['secret']}\n(id {made['id']}; shown this once)")


@app.command("list")
def key_list(tenant: str, url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """List a tenant's keys, without their secrets."""
    with told():
        found = operator_client(url, key).call("GET", f"/admin/v1/tenants/{segment(tenant)}/keys")["data"]
    show_table(found, as_json, ("id", "prefix", "label", "scopes", "created_at", "revoked_at"))


@app.command("operator")
def key_operator(as_json: Json = False) -> None:
    """Make another operator's key, straight in the database of this machine: for when the last one is lost."""
    with told():
        from gateway.keys import make_operator_key

        settings = settings_of()
        made = asyncio.run(make_operator_key(settings.database))
        Home(settings.home).keep_operator_key(made)
    show({"secret": made}, as_json, f"{made}\n(kept in {settings.home / 'operator-key'})")


@app.command("revoke")
def key_revoke(key_id: str, url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """Revoke a key for good."""
    with told():
        operator_client(url, key).call("DELETE", f"/admin/v1/keys/{segment(key_id)}")
    show({"id": key_id, "revoked": True}, as_json, f"{key_id} is revoked")
