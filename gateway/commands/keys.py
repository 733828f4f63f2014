"""`tailor key`: API keys, of tenants and of operators."""

import asyncio
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.common import (
    Json,
    OperatorKey,
    Url,
    operator_client,
    pages,
    segment,
    settings_of,
    show,
    show_table,
    tenant_client,
    told,
)
from gateway.home import ConfigurationError, Home

if TYPE_CHECKING:
    from gateway.api_client import ApiClient

app = typer.Typer(
    help="API keys, with an operator's key; or of one's own tenant: --self, with a key that has the scope `admin`.",
    no_args_is_help=True,
)
DAY_S = 86_400
Tenant = Annotated[str | None, typer.Argument(help="Name or id of the tenant.", show_default=False)]
Own = Annotated[bool, typer.Option("--self", help="The tenant of TAILOR_API_KEY, by that key.")]
Operators = Annotated[bool, typer.Option("--operator", help="Operators' keys.")]
ApiKey = Annotated[
    str | None,
    typer.Option(envvar="TAILOR_API_KEY", help="With --self: a key with the scope `admin`.", show_default=False),
]


@app.command("create")
def key_create(
    tenant: Tenant = None,
    label: Annotated[str, typer.Option(help="What it is for.")] = "",
    scope: Annotated[
        list[str] | None,
        typer.Option(help="inference, adapters, training, admin (repeat it); default: all but admin."),
    ] = None,
    days: Annotated[float | None, typer.Option(min=0, help="How long it lives; default: as its maker.")] = None,
    own: Own = False,
    operators: Operators = False,
    api_key: ApiKey = None,
    url: Url = None,
    key: OperatorKey = None,
    as_json: Json = False,
) -> None:
    """Make a key for a tenant, for one's own (--self) or for an operator. It is shown this once."""
    body: dict[str, Any] = {"label": label}
    if scope:
        body["scopes"] = scope
    if days is not None:
        body["expires_at"] = int(time.time() + days * DAY_S)
    with told():
        client, path = _where(tenant, own, operators, api_key, url, key)
        made = client.call("POST", path, body)
    _show_secret(made, as_json)


@app.command("list")
def key_list(
    tenant: Tenant = None,
    own: Own = False,
    operators: Operators = False,
    api_key: ApiKey = None,
    url: Url = None,
    key: OperatorKey = None,
    as_json: Json = False,
) -> None:
    """List a tenant's keys, one's own tenant's (--self) or operators', without their secrets."""
    with told():
        client, path = _where(tenant, own, operators, api_key, url, key)
        found = pages(client, path, "id")
    columns = ("id", "prefix", "label", "scopes", "created_at", "last_used_at", "expires_at", "revoked_at")
    show_table(found, as_json, columns)


@app.command("rotate")
def key_rotate(
    key_id: str,
    overlap_s: Annotated[int, typer.Option(min=0, help="For how long the old key goes on, in seconds.")] = DAY_S,
    own: Own = False,
    api_key: ApiKey = None,
    url: Url = None,
    key: OperatorKey = None,
    as_json: Json = False,
) -> None:
    """Make a key's successor: same scopes, label and end. It is shown this once."""
    with told():
        client, path = _one(key_id, own, api_key, url, key)
        made = client.call("POST", f"{path}/rotate", {"overlap_s": overlap_s})
    _show_secret(made, as_json)


@app.command("revoke")
def key_revoke(
    key_id: str,
    own: Own = False,
    api_key: ApiKey = None,
    url: Url = None,
    key: OperatorKey = None,
    as_json: Json = False,
) -> None:
    """Revoke a key for good."""
    with told():
        client, path = _one(key_id, own, api_key, url, key)
        client.call("DELETE", path)
    show({"id": key_id, "revoked": True}, as_json, f"{key_id} is revoked")


@app.command("operator")
def key_operator(as_json: Json = False) -> None:
    """Make another operator's key, straight in the database of this machine: for when the last one is lost."""
    with told():
        from gateway.keys import make_operator_key

        settings = settings_of()
        made = asyncio.run(make_operator_key(settings.database))
        Home(settings.home).keep_operator_key(made)
    show({"secret": made}, as_json, f"{made}\n(kept in {settings.home / 'operator-key'})")


def _where(
    tenant: str | None, own: bool, operators: bool, api_key: str | None, url: str | None, key: str | None
) -> tuple["ApiClient", str]:
    """Whose keys are meant: who to ask as, and the path of their list."""
    if (tenant is not None) + own + operators != 1:
        raise ConfigurationError("Name a tenant, or say --self (your own tenant's) or --operator (operators').")
    if own:
        return tenant_client(url, api_key), "/v1/keys"
    if operators:
        return operator_client(url, key), "/admin/v1/keys"
    return operator_client(url, key), f"/admin/v1/tenants/{segment(tenant or '')}/keys"


def _one(key_id: str, own: bool, api_key: str | None, url: str | None, key: str | None) -> tuple["ApiClient", str]:
    if own:
        return tenant_client(url, api_key), f"/v1/keys/{segment(key_id)}"
    return operator_client(url, key), f"/admin/v1/keys/{segment(key_id)}"


def _show_secret(made: Any, as_json: bool) -> None:
    show(made, as_json, f"{made['secret']}\n(id {made['id']}; shown this once)")
