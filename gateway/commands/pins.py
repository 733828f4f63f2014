"""`tailor pins`: adapters that stay loaded, for operators; a tenant's own verbs are `tailor adapter pin|unpin`."""

from typing import Annotated

import typer

from gateway.commands.common import Json, OperatorKey, Url, operator_client, segment, show, show_table, told

app = typer.Typer(help="Adapters that stay loaded (with an operator's key).", no_args_is_help=True)
COLUMNS = ("tenant_id", "name", "pinned_by", "at")
Tenant = Annotated[str, typer.Argument(help="The tenant's name or id.")]
Adapter = Annotated[str, typer.Argument(help="The adapter's name.")]


@app.command("list")
def list_pins(url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """List every tenant's pinned adapters, and who has pinned them."""
    with told():
        found = operator_client(url, key).call("GET", "/admin/v1/pins")["data"]
    show_table(found, as_json, COLUMNS)


@app.command("add")
def add(tenant: Tenant, adapter: Adapter, url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """Keep a tenant's adapter loaded, beyond what its plan lets it pin."""
    with told():
        made = operator_client(url, key).call("PUT", _path(tenant, adapter))
    show(made, as_json, f"{adapter} of {tenant} stays loaded")


@app.command("remove")
def remove(tenant: Tenant, adapter: Adapter, url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """Let an adapter go when room is needed, whoever has pinned it."""
    with told():
        operator_client(url, key).call("DELETE", _path(tenant, adapter))
    show({"tenant": tenant, "name": adapter, "pinned": False}, as_json, f"{adapter} of {tenant} is not pinned any more")


def _path(tenant: str, adapter: str) -> str:
    return f"/admin/v1/tenants/{segment(tenant)}/pins/{segment(adapter)}"
