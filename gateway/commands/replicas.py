"""`tailor replicas`: the engines behind a gateway, for operators."""

import time
from typing import Annotated, Any

import typer

from gateway.commands.common import Json, OperatorKey, Url, fail, operator_client, segment, show, show_table, told

app = typer.Typer(help="The replicas behind a gateway (with an operator's key).", no_args_is_help=True)
PATH = "/admin/v1/replicas"
COLUMNS = ("id", "state", "in_flight", "waiting", "adapters", "source", "url")
LOOK_S = 0.5
Replica = Annotated[str, typer.Argument(help="The replica's id, from `tailor replicas list`.")]


@app.command("list")
def list_replicas(url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """List all replicas with their states."""
    with told():
        found = operator_client(url, key).call("GET", PATH)["data"]
    show_table(found, as_json, COLUMNS)


@app.command("add")
def add(
    address: Annotated[str, typer.Argument(help="http://host:port or unix:/path.")],
    url: Url = None,
    key: OperatorKey = None,
    as_json: Json = False,
) -> None:
    """Add a replica; it takes requests once its engine has given a token."""
    with told():
        made = operator_client(url, key).call("POST", PATH, {"url": address})
    show(made, as_json, f"replica {made['id']} is {made['state']}")


@app.command("drain")
def drain(
    replica: Replica,
    wait_s: Annotated[float, typer.Option("--wait", help="Seconds to wait for its requests to end.")] = 0,
    url: Url = None,
    key: OperatorKey = None,
    as_json: Json = False,
) -> None:
    """Keep requests away from a replica, for a restart say; those that run end in their own time."""
    with told():
        client = operator_client(url, key)
        shown: dict[str, Any] = client.call("POST", f"{PATH}/{segment(replica)}/drain")
        until = time.monotonic() + wait_s
        while shown["state"] == "draining" and time.monotonic() < until:
            time.sleep(LOOK_S)
            shown = client.call("GET", f"{PATH}/{segment(replica)}")
    show(shown, as_json, f"replica {shown['id']} is {shown['state']}, {shown['in_flight']} in flight")
    if wait_s and shown["state"] == "draining":
        fail(f"requests still run there after {wait_s:g} s")


@app.command("resume")
def resume(replica: Replica, url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """Let requests come to a drained replica again."""
    with told():
        shown = operator_client(url, key).call("POST", f"{PATH}/{segment(replica)}/resume")
    show(shown, as_json, f"replica {shown['id']} is {shown['state']}")


@app.command("remove")
def remove(replica: Replica, url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """Take a replica out of the pool; requests that run there end in their own time."""
    with told():
        operator_client(url, key).call("DELETE", f"{PATH}/{segment(replica)}")
    show({"id": replica, "removed": True}, as_json, f"replica {replica} is removed")
