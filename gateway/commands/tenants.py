"""`tailor tenant`: the operator's customers."""

import typer

from gateway.commands.common import Json, OperatorKey, Url, operator_client, show, show_table, told

tenant_app = typer.Typer(help="Tenants (with an operator's key).", no_args_is_help=True)


@tenant_app.command("create")
def tenant_create(name: str, url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """Make a tenant."""
    with told():
        made = operator_client(url, key).call("POST", "/admin/v1/tenants", {"name": name})
    show(
        made,
        as_json,
        f"tenant {made['name']} ({made['id']}); its first key: tailor key create {made['name']}",
    )


@tenant_app.command("list")
def tenant_list(url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """List all tenants."""
    with told():
        found = operator_client(url, key).call("GET", "/admin/v1/tenants")["data"]
    show_table(found, as_json, ("name", "id", "created_at"))
