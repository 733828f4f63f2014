"""`tailor tenant` and `tailor plan`: the operator's customers, and what each may use."""

from typing import Annotated, Any

import typer

from gateway.commands.common import (
    Json,
    OperatorKey,
    Url,
    operator_client,
    pages,
    segment,
    show,
    show_table,
    told,
)
from gateway.home import ConfigurationError

tenant_app = typer.Typer(help="Tenants (with an operator's key).", no_args_is_help=True)
plan_app = typer.Typer(help="Plans: weights and limits of tenants (with an operator's key).", no_args_is_help=True)
LIMITS = (
    "requests_per_minute",
    "tokens_per_minute",
    "concurrent_requests",
    "max_output_tokens",
    "max_prompt_bytes",
    "tokens_per_month",
    "loads_per_minute",
    "pinned_adapters",
    "max_adapters",
    "max_versions",
    "max_stored_bytes",
    "max_rank",
    "max_files",
    "max_stored_file_bytes",
    "max_queued_jobs",
    "max_running_jobs",
)
Limit = Annotated[str | None, typer.Option(metavar="N|none", show_default=False)]
Weight = Annotated[float | None, typer.Option(help="Share of a busy server, beside others'.", show_default=False)]


@tenant_app.command("create")
def tenant_create(
    name: str,
    plan: Annotated[str, typer.Option(help="What it may use.")] = "default",
    url: Url = None,
    key: OperatorKey = None,
    as_json: Json = False,
) -> None:
    """Make a tenant."""
    with told():
        made = operator_client(url, key).call("POST", "/admin/v1/tenants", {"name": name, "plan": plan})
    show(
        made,
        as_json,
        f"tenant {made['name']} ({made['id']}); its first key: tailor key create {made['name']}",
    )


@tenant_app.command("list")
def tenant_list(url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """List all tenants."""
    with told():
        found = pages(operator_client(url, key), "/admin/v1/tenants", "name")
    show_table(found, as_json, ("name", "id", "plan", "created_at", "suspended_at"))


@tenant_app.command("storage")
def tenant_storage(url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """What each tenant keeps: adapters, training files, and what is on its way."""
    with told():
        found = pages(operator_client(url, key), "/admin/v1/storage/tenants", "tenant")
    columns = ("tenant", "adapters", "versions", "adapter_bytes", "files", "file_bytes", "uploads", "upload_bytes")
    show_table(found, as_json, columns)


@tenant_app.command("show")
def tenant_show(name: str, url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """Show one tenant, by name or id."""
    with told():
        found = operator_client(url, key).call("GET", f"/admin/v1/tenants/{segment(name)}")
    show_table(found if as_json else [found], as_json, ("name", "id", "plan", "created_at", "suspended_at"))


@tenant_app.command("update")
def tenant_update(
    name: str,
    plan: Annotated[str, typer.Option(help="The plan to put it on.")],
    url: Url = None,
    key: OperatorKey = None,
    as_json: Json = False,
) -> None:
    """Put a tenant on another plan."""
    changed = _change(name, {"plan": plan}, url, key)
    show(changed, as_json, f"tenant {changed['name']} is on the plan {changed['plan']}")


@tenant_app.command("suspend")
def tenant_suspend(name: str, url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """Refuse all keys of a tenant until it is resumed."""
    changed = _change(name, {"suspended": True}, url, key)
    show(changed, as_json, f"tenant {changed['name']} is suspended")


@tenant_app.command("resume")
def tenant_resume(name: str, url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """Let a suspended tenant go on, with the keys that it had."""
    changed = _change(name, {"suspended": False}, url, key)
    show(changed, as_json, f"tenant {changed['name']} goes on")


def _change(name: str, values: dict[str, Any], url: str | None, key: str | None) -> Any:
    with told():
        return operator_client(url, key).call("PATCH", f"/admin/v1/tenants/{segment(name)}", values)


@plan_app.command("create")
def plan_create(
    name: str,
    weight: Weight = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    concurrent_requests: Limit = None,
    max_output_tokens: Limit = None,
    max_prompt_bytes: Limit = None,
    tokens_per_month: Limit = None,
    loads_per_minute: Limit = None,
    pinned_adapters: Limit = None,
    max_adapters: Limit = None,
    max_versions: Limit = None,
    max_stored_bytes: Limit = None,
    max_rank: Limit = None,
    max_files: Limit = None,
    max_stored_file_bytes: Limit = None,
    max_queued_jobs: Limit = None,
    max_running_jobs: Limit = None,
    url: Url = None,
    key: OperatorKey = None,
    as_json: Json = False,
) -> None:
    """Make a plan; a limit that is not given is no limit."""
    with told():
        body = {"name": name, **_limits(locals())}
        made = operator_client(url, key).call("POST", "/admin/v1/plans", body)
    show(made, as_json, f"plan {made['name']}; put a tenant on it: tailor tenant update TENANT --plan {made['name']}")


@plan_app.command("list")
def plan_list(url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """List all plans."""
    with told():
        found = operator_client(url, key).call("GET", "/admin/v1/plans")["data"]
    show_table(found, as_json, ("name", "weight", *LIMITS))


@plan_app.command("show")
def plan_show(name: str, url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """Show one plan."""
    with told():
        found = operator_client(url, key).call("GET", f"/admin/v1/plans/{segment(name)}")
    show_table(found if as_json else [found], as_json, ("name", "weight", *LIMITS))


@plan_app.command("update")
def plan_update(
    name: str,
    weight: Weight = None,
    requests_per_minute: Limit = None,
    tokens_per_minute: Limit = None,
    concurrent_requests: Limit = None,
    max_output_tokens: Limit = None,
    max_prompt_bytes: Limit = None,
    tokens_per_month: Limit = None,
    loads_per_minute: Limit = None,
    pinned_adapters: Limit = None,
    max_adapters: Limit = None,
    max_versions: Limit = None,
    max_stored_bytes: Limit = None,
    max_rank: Limit = None,
    max_files: Limit = None,
    max_stored_file_bytes: Limit = None,
    max_queued_jobs: Limit = None,
    max_running_jobs: Limit = None,
    url: Url = None,
    key: OperatorKey = None,
    as_json: Json = False,
) -> None:
    """Change a plan for all tenants on it; what is not given stays, `none` takes a limit away."""
    with told():
        body = _limits(locals())
        changed = operator_client(url, key).call("PATCH", f"/admin/v1/plans/{segment(name)}", body)
    show_table(changed if as_json else [changed], as_json, ("name", "weight", *LIMITS))


@plan_app.command("delete")
def plan_delete(name: str, url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """Delete a plan that no tenant is on."""
    with told():
        operator_client(url, key).call("DELETE", f"/admin/v1/plans/{segment(name)}")
    show({"name": name, "deleted": True}, as_json, f"plan {name} is deleted")


def _limits(given: dict[str, Any]) -> dict[str, float | int | None]:
    """The weight and the limits among a verb's options, those that were given."""
    found: dict[str, float | int | None] = {name: _limit(name, given[name]) for name in LIMITS if given[name]}
    if given["weight"] is not None:
        found["weight"] = given["weight"]
    return found


def _limit(name: str, text: str) -> int | None:
    if text == "none":
        return None
    if not text.isascii() or not text.isdigit():
        raise ConfigurationError(f"--{name.replace('_', '-')} is a whole number or `none`, not '{text}'.")
    return int(text)
