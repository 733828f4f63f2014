"""`tailor erasure`: receipts of what was erased, and whether they are what was signed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.common import (
    Json,
    Key,
    Url,
    operator_client,
    pages,
    segment,
    show,
    show_table,
    tenant_client,
    told,
)
from gateway.home import ConfigurationError

if TYPE_CHECKING:
    from gateway.api_client import ApiClient

app = typer.Typer(help="Receipts of what was erased (with the tenant's key).", no_args_is_help=True)
Keys = Annotated[
    Path | None,
    typer.Option(help="File with the public keys, as GET /v1/signing-keys gave them; default: ask the gateway."),
]
AsOperator = Annotated[bool, typer.Option("--operator", help="Every tenant's, with an operator's key.")]
OperatorKey = Annotated[
    str | None,
    typer.Option(envvar="TAILOR_OPERATOR_KEY", help="Default: the one in the home folder.", show_default=False),
]


@app.command("list")
def erasure_list(
    operator: AsOperator = False,
    url: Url = None,
    key: Key = None,
    operator_key: OperatorKey = None,
    as_json: Json = False,
) -> None:
    """List erasures, the oldest first."""
    with told():
        client, path = _client(operator, url, key, operator_key)
        found = pages(client, path, "id")
    rows = [{**erasure["statement"], **erasure, "of": _subject(erasure["statement"])} for erasure in found]
    columns = ("id", "tenant_id", "of", "scope", "state", "pending", "requested_at", "completed_at")
    show_table(found if as_json else rows, as_json, columns)


@app.command("show")
def erasure_show(
    erasure: str,
    operator: AsOperator = False,
    url: Url = None,
    key: Key = None,
    operator_key: OperatorKey = None,
    as_json: Json = True,
) -> None:
    """Print one erasure as JSON: keep it, `tailor erasure verify` checks it."""
    with told():
        client, path = _client(operator, url, key, operator_key)
        found = client.call("GET", f"{path}/{segment(erasure)}")
    show(found, as_json, "")


@app.command("vouch")
def erasure_vouch(
    erasure: str,
    replica: Annotated[str, typer.Argument(help="Its id, as the erasure's `pending` has it.")],
    url: Url = None,
    operator_key: OperatorKey = None,
    as_json: Json = False,
) -> None:
    """Say, as an operator, that a replica which will not be back holds nothing any more: its disk is wiped.

    The receipt says who said so.
    """
    with told():
        client, path = _client(True, url, None, operator_key)
        found = client.call("POST", f"{path}/{segment(erasure)}/replicas/{segment(replica)}/vouch")
    waits = f", still to be erased on {', '.join(found['pending'])}" if found["pending"] else ""
    show(found, as_json, f"erasure {found['id']} is {found['state']}{waits}")


@app.command("verify")
def erasure_verify(
    file: Annotated[Path, typer.Argument(help="A receipt, as `tailor erasure show` printed it.")],
    keys: Keys = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Check a receipt: that it is what was signed, by one of the keys. With --keys nothing is asked of any server."""
    from adapter_store.signing import Kind, verify_shown

    with told():
        receipt = _json_of(file, "statement", "signature")
        if receipt["signature"] is None:
            raise ConfigurationError(f"{file}: the erasure was not completed yet; ask for its receipt again.")
        public = signing_keys(keys, None if keys is not None else tenant_client(url, key))
        stated = verify_shown(receipt["statement"], receipt["signature"], public, Kind.ERASURE)
    show(stated, as_json, f"{file} is signed: {_subject(stated)} of {stated['tenant_id']} was erased ({stated['id']})")


def _subject(stated: Mapping[str, Any]) -> str:
    """What was erased: an adapter or a version by name, anything else by its id."""
    if "subject" in stated:
        return str(stated["subject"])
    numbers = (f"@{v['number']}" for v in stated["versions"] if stated["scope"] == "version")
    return str(stated["adapter"]) + "".join(numbers)


def signing_keys(file: Path | None, client: "ApiClient | None") -> list[dict[str, Any]]:
    """The public keys of a file, or of the gateway."""
    if file is None:
        assert client is not None
        found: list[dict[str, Any]] = client.call("GET", "/v1/signing-keys")["keys"]
        return found
    listed: list[dict[str, Any]] = _json_of(file, "keys")["keys"]
    return listed


def _json_of(file: Path, *members: str) -> dict[str, Any]:
    try:
        found = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigurationError(f"{file} is not JSON.") from error
    if not isinstance(found, dict) or not all(name in found for name in members):
        raise ConfigurationError(f"{file} has no {' and '.join(members)}: it is not such a file.")
    return found


def _client(operator: bool, url: str | None, key: str | None, operator_key: str | None) -> "tuple[ApiClient, str]":
    if operator:
        return operator_client(url, operator_key), "/admin/v1/erasures"
    return tenant_client(url, key), "/v1/erasures"
