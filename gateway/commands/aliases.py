"""`tailor alias` and `tailor rollout`: which version answers to which name (with the tenant's key)."""

from typing import Annotated, Any

import typer

from gateway.commands.adapters import FallbackChoice
from gateway.commands.common import Json, Key, Url, adapter_path, show, show_table, tenant_client, told
from gateway.home import ConfigurationError

alias_app = typer.Typer(help="The names of an adapter that move (with the tenant's key).", no_args_is_help=True)
rollout_app = typer.Typer(
    help="An alias on its way to another version, and back if it does worse.", no_args_is_help=True
)
Reason = Annotated[str, typer.Option(help="Kept in the history.")]
Alias = Annotated[str, typer.Option(help="The alias; 'default' is the adapter's bare name.")]


@alias_app.command("set")
def alias_set(
    name: Annotated[str, typer.Argument(help="The adapter.")],
    alias: Annotated[str, typer.Argument(help="The alias; 'default' is the adapter's bare name.")],
    versions: Annotated[
        list[str],
        typer.Argument(help="A version's number, or one that was scaled: 3*0.7; or several with weights: 3=90 4=10."),
    ],
    reason: Reason = "",
    fallback: Annotated[FallbackChoice | None, typer.Option(help="Who answers where the version cannot.")] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Make an alias, or let it stand for other versions: from now on, within a second at every gateway."""
    with told():
        body: dict[str, Any] = {"versions": [_share(text) for text in versions], "reason": reason}
        if fallback is not None:
            body["fallback"] = fallback.value
        moved = tenant_client(url, key).call("PUT", adapter_path(name, "aliases", alias), body)
    show(moved, as_json, f"{moved['model']}: {_spelled(moved['versions'])}")


@alias_app.command("list")
def alias_list(name: str, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """List an adapter's aliases."""
    with told():
        found = tenant_client(url, key).call("GET", adapter_path(name, "aliases"))["data"]
    rows = [{**alias, "versions": _spelled(alias["versions"])} for alias in found]
    show_table(found if as_json else rows, as_json, ("name", "model", "versions", "fallback", "rollout", "moved_at"))


@alias_app.command("remove")
def alias_remove(name: str, alias: str, url: Url = None, key: Key = None) -> None:
    """Remove an alias; 'default' goes with its adapter only."""
    with told():
        tenant_client(url, key).call("DELETE", adapter_path(name, "aliases", alias))
    print(f"{name}:{alias} is no more")


@alias_app.command("rollback")
def alias_rollback(
    name: str,
    alias: Annotated[str, typer.Argument(help="The alias.")] = "default",
    reason: Reason = "",
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Back to what the alias stood for before its last move; again: before the one before that."""
    with told():
        moved = tenant_client(url, key).call(
            "POST", adapter_path(name, "aliases", alias, "rollback"), {"reason": reason}
        )
    show(moved, as_json, f"{moved['model']}: {_spelled(moved['versions'])}")


@alias_app.command("history")
def alias_history(
    name: str,
    alias: Annotated[str | None, typer.Option(help="Of this alias only.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000, help="How many moves.")] = 20,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Who moved what when, the newest first."""
    params = {"limit": limit, **({"alias": alias} if alias else {})}
    with told():
        found = tenant_client(url, key).call("GET", adapter_path(name, "history"), params=params)["data"]
    rows = [{**move, "before": _spelled(move["before"]), "after": _spelled(move["after"])} for move in found]
    columns = ("number", "moved_at", "alias", "kind", "before", "after", "moved_by", "reason")
    show_table(found if as_json else [{**row, "moved_at": row["at"]} for row in rows], as_json, columns)


@rollout_app.command("start")
def rollout_start(
    name: Annotated[str, typer.Argument(help="The adapter.")],
    version: Annotated[int, typer.Argument(min=1, help="The version that the alias is to go to.")],
    alias: Alias = "default",
    steps: Annotated[str, typer.Option(help="Per cent of the traffic, step by step.")] = "5,25,50,100",
    step_s: Annotated[int, typer.Option(min=1, help="Seconds that a step lasts at least.")] = 60,
    min_requests: Annotated[int, typer.Option(min=1, help="Requests that a step needs at least.")] = 20,
    max_error_increase: Annotated[float, typer.Option(min=0, max=1, help="How much more often it may fail.")] = 0.01,
    max_latency_ratio: Annotated[float, typer.Option(min=1, help="How much slower it may be.")] = 2.0,
    needs_proof: Annotated[bool, typer.Option(help="Whether it waits for the proof of effect.")] = True,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Let an alias go to another version step by step; it goes back by itself where that one does worse."""
    with told():
        if not all(step.strip().isdecimal() for step in steps.split(",")):
            raise ConfigurationError(f"--steps {steps!r}: whole per cents with commas, as in 5,25,100.")
        body = {
            "version": version,
            "alias": alias,
            "steps": [int(step) for step in steps.split(",")],
            "step_s": step_s,
            "min_requests": min_requests,
            "max_error_increase": max_error_increase,
            "max_latency_ratio": max_latency_ratio,
            "needs_proof": needs_proof,
        }
        begun = tenant_client(url, key).call("POST", adapter_path(name, "rollouts"), body)
    show(begun, as_json, f"{begun['id']}: {begun['percent']} % of {name}:{alias} go to version {version}")


@rollout_app.command("list")
def rollout_list(name: str, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """List an adapter's rollouts, the newest first."""
    with told():
        found = tenant_client(url, key).call("GET", adapter_path(name, "rollouts"))["data"]
    show_table(found, as_json, ("id", "alias", "previous", "version", "percent", "status", "reason", "started_at"))


@rollout_app.command("show")
def rollout_show(name: str, rollout: str, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Where a rollout is, and what was seen of its two versions."""
    with told():
        found = tenant_client(url, key).call("GET", adapter_path(name, "rollouts", rollout))
    if as_json:
        show_table(found, True, ())
        return
    print(f"{found['status']} at {found['percent']} %{': ' if found['reason'] else ''}{found['reason']}")
    show_table(found["seen"], False, ("version", "requests", "errors", "p90_s"))


@rollout_app.command("cancel")
def rollout_cancel(
    name: str, rollout: str, reason: Reason = "", url: Url = None, key: Key = None, as_json: Json = False
) -> None:
    """Back to the version before, at once."""
    with told():
        ended = tenant_client(url, key).call(
            "POST", adapter_path(name, "rollouts", rollout, "cancel"), {"reason": reason}
        )
    show(ended, as_json, f"{ended['id']}: {ended['status']}")


def _share(text: str) -> dict[str, int | str]:
    version, _, weight = text.partition("=")
    number, _, factor = version.partition("*")
    if not number.isdecimal() or not (weight or "1").isdecimal():
        raise ConfigurationError(f"{text!r} is not a version's number, or a number and its weight as in 3=90.")
    return {"version": version if factor else int(number), "weight": int(weight or 1)}


def _spelled(shares: list[dict[str, int]]) -> str:
    if len(shares) == 1:
        return str(shares[0]["version"])
    return " ".join(f"{share['version']}={share['weight']}" for share in shares)
