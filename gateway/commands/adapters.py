"""`tailor adapter` and `tailor chat`: the tenant's work."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.common import (
    Json,
    Key,
    OperatorKey,
    Url,
    adapter_path,
    fail,
    operator_client,
    pages,
    segment,
    show,
    show_table,
    tenant_client,
    told,
)
from gateway.commands.erasures import Keys, signing_keys
from gateway.home import ConfigurationError

if TYPE_CHECKING:
    from gateway.api_client import ApiClient

app = typer.Typer()
adapter_app = typer.Typer(help="A tenant's adapters (with the tenant's key).", no_args_is_help=True)


def version_path(name: str) -> str:
    """Where an adapter, or with `name@3` one of its versions, is found."""
    adapter, _, number = name.partition("@")
    return f"/v1/adapters/{segment(adapter)}" + (f"/versions/{segment(number)}" if number else "")


class FallbackChoice(StrEnum):
    """As in adapter_store.catalog, which is too heavy to import for --help."""

    FAIL = "fail"
    BASE = "base"
    PREVIOUS = "previous"


@adapter_app.command("push")
def adapter_push(
    folder: Annotated[Path, typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors.")],
    name: Annotated[str | None, typer.Option(help="What requests call it; default: the folder's name.")] = None,
    alias: Annotated[
        str, typer.Option(help="The alias that is to stand for it; '' moves none, for a rollout.")
    ] = "default",
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Publish an adapter: checked, stored, and served from the next request on.

    A large one goes in parts: broken off, the same command again goes on where it was.
    """
    from gateway.push import FILES, Push, shown

    with told():
        for file in FILES:
            if not (folder / file).is_file():
                raise ConfigurationError(f"{folder / file} does not exist: name the folder that PEFT saved.")
        client = tenant_client(url, key)
        with shown() as stage:
            made = Push(client, segment(name or folder.resolve().name), folder, stage=stage, alias=alias).run()
    show(made, as_json, _published(made))


@adapter_app.command("import")
def adapter_import(
    tenant: Annotated[str, typer.Argument(help="The tenant's name or id.")],
    name: Annotated[str, typer.Argument(help="What requests will call it.")],
    folder: Annotated[
        str | None, typer.Option(help="Folder on the server, below TAILOR_IMPORT_ROOT.", show_default=False)
    ] = None,
    blobs: Annotated[str | None, typer.Option(help="Below imports/ in the blob store.", show_default=False)] = None,
    url: Url = None,
    key: OperatorKey = None,
    as_json: Json = False,
) -> None:
    """Publish for a tenant what lies on the server or in the blob store (with an operator's key)."""
    place = {"folder": folder} if folder is not None else {"blobs": blobs}
    with told():
        if (folder is None) == (blobs is None):
            raise ConfigurationError("Name one of --folder and --blobs.")
        path = f"/admin/v1/tenants/{segment(tenant)}/adapters/{segment(name)}/import"
        made = operator_client(url, key).call("POST", path, place)
    show(made, as_json, _published(made))


def _published(version: dict[str, Any]) -> str:
    return f"{version['adapter']}@{version['number']}: rank {version['rank']}, {version['bytes']:,} bytes"


@adapter_app.command("check")
def adapter_check(
    folder: Annotated[Path, typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors.")],
    base: Annotated[
        Path | None,
        typer.Option(
            help="What `tailor base show --json` wrote, or the base model's folder (of which config.json may do); "
            "default: the gateway is asked."
        ),
    ] = None,
    base_name: Annotated[str | None, typer.Option(help="What the server calls it; default: the folder's name.")] = None,
    dtype: Annotated[str, typer.Option(help="In which it is served; auto: the one in config.json.")] = "auto",
    max_rank: Annotated[int | None, typer.Option(min=1, help="Highest rank that is served.")] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Check an adapter as the server would, here: every fault at once, status 1 where there is one."""
    with told():
        from dataclasses import asdict, replace

        from adapter_store.base_description import read_base, read_description
        from adapter_store.inspection import inspect

        if base is None:
            asked = tenant_client(url, key)
            against, bounds = read_description(asked.call("GET", "/v1/base-model"), source=asked.url)
        else:
            against, bounds = read_base(base, name=base_name, dtype=dtype)
        verdict = inspect(folder, against, bounds if max_rank is None else replace(bounds, max_rank=max_rank))
    faults = [asdict(fault) for fault in verdict.faults]
    result = {"fit": not faults, "base": against.name, "faults": faults}
    if not against.fingerprint:
        result["not_checked"] = ["fingerprint: it covers the base model's weights, which are not here"]
    if as_json or not faults:
        modules = " ".join(verdict.modules)
        show(result, as_json, f"{folder}: fit to be served on {against.name}: rank {verdict.rank}, {modules}")
    if faults and not as_json:
        from gateway.api_client import listed

        fail(f"{folder} cannot be served on {against.name}:{listed(faults)}")
    if faults:
        raise typer.Exit(1)


@adapter_app.command("list")
def adapter_list(url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """List the tenant's adapters."""
    with told():
        found = pages(tenant_client(url, key), "/v1/adapters", "name")
    rows = [{**_row(adapter["current"]), **adapter} for adapter in found]
    columns = ("name", "number", "rank", "bytes", "proof", "fallback", "created_at")
    show_table(found if as_json else rows, as_json, columns)


@adapter_app.command("show")
def adapter_show(name: str, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Show one adapter with its versions."""
    with told():
        found = _with_all_versions(tenant_client(url, key), name)
    if as_json:
        show_table(found, True, ())
    else:
        rows = [_row(version) for version in found["versions"]]
        show_table(rows, False, ("number", "digest", "rank", "bytes", "proof", "published_by", "created_at"))


def _with_all_versions(client: "ApiClient", name: str) -> dict[str, Any]:
    """The adapter and every page of its versions."""
    path = f"{adapter_path(name)}?limit=1000"
    page = client.call("GET", path)
    versions = page["versions"]
    while page["has_more"]:
        page = client.call("GET", f"{path}&before={versions[-1]['number']}")
        versions += page["versions"]
    return {**page, "versions": versions}


def _row(version: dict[str, Any]) -> dict[str, Any]:
    """A version as a table shows it."""
    return {**version, "proof": version["proof"]["status"]}


@adapter_app.command("fallback")
def adapter_fallback(
    name: str,
    answers: Annotated[FallbackChoice, typer.Argument(help="Who answers where the adapter's version cannot.")],
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Declare who answers where an adapter's version cannot: nobody, the base model, or the version before."""
    with told():
        changed = tenant_client(url, key).call("PATCH", adapter_path(name), {"fallback": answers.value})
    show(changed, as_json, f"{name}: fallback {changed['fallback']}")


@adapter_app.command("scale")
def adapter_scale(
    version: Annotated[str, typer.Argument(help="A version: name@3.")],
    factor: Annotated[str, typer.Argument(help="Above 0, at most 2, of at most 4 decimals.")],
    alias: Annotated[str, typer.Option(help="The alias that is to stand for it; default: none is moved.")] = "",
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Make name@3*0.7: the version with what it adds to the base model times 0.7, exactly; no training."""
    with told():
        name, _, number = version.partition("@")
        if not number.isdecimal():
            raise ConfigurationError(f"{version!r} is not a version: name it by its number, as in name@3.")
        body = {"factor": factor, "alias": alias}
        made = tenant_client(url, key).call("POST", adapter_path(name, "versions", number, "scaled"), body)
    show(made, as_json, f"{version}*{factor} is {name}@{made['number']}")


@adapter_app.command("warm")
def adapter_warm(
    name: str,
    version: Annotated[int | None, typer.Option(help="Its number; default: what the name stands for.")] = None,
    everywhere: Annotated[bool, typer.Option("--everywhere", help="In every replica, not in its home alone.")] = False,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Load an adapter before the first request asks for it."""
    with told():
        body = {"version": version, "everywhere": everywhere}
        done = tenant_client(url, key).call("POST", adapter_path(name, "warm"), body)
    where = ", ".join(f"{place['replica']} {place['tier']}" for place in done["replicas"])
    show(done, as_json, f"{name}@{done['version']}: {where}")


@adapter_app.command("where")
def adapter_where(name: str, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Show in which replicas an adapter's versions are: device, host memory, disk."""
    with told():
        found = tenant_client(url, key).call("GET", adapter_path(name, "residency"))["data"]
    rows = [{**row, "replicas": [f"{place['replica']}:{place['tier']}" for place in row["replicas"]]} for row in found]
    show_table(found if as_json else rows, as_json, ("version", "digest", "pinned", "replicas"))


@adapter_app.command("pin")
def adapter_pin(name: str, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Keep an adapter loaded, within the tenant's plan."""
    with told():
        made = tenant_client(url, key).call("PUT", adapter_path(name, "pin"))
    show(made, as_json, f"{name} stays loaded")


@adapter_app.command("unpin")
def adapter_unpin(name: str, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Let an adapter go when room is needed."""
    with told():
        tenant_client(url, key).call("DELETE", adapter_path(name, "pin"))
    show({"name": name, "pinned": False}, as_json, f"{name} is not pinned any more")


@adapter_app.command("delete")
def adapter_delete(
    name: Annotated[str, typer.Argument(help="An adapter, or one of its versions: name@3.")],
    force: Annotated[bool, typer.Option("--force", help="Though aliases stand for it or requests run on it.")] = False,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Erase an adapter, or one version, everywhere; prints where the receipt is."""
    with told():
        path = version_path(name)
        erasure = tenant_client(url, key).call("DELETE", path, params={"force": force})
    waits = f", but still to be erased on {', '.join(erasure['pending'])}" if erasure["pending"] else ""
    show(erasure, as_json, f"{name} is erased{waits}; receipt: tailor erasure show {erasure['id']}")


@adapter_app.command("verify")
def adapter_verify(
    name: Annotated[str, typer.Argument(help="An adapter, or one of its versions: name@3.")],
    keys: Keys = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Check who published an adapter's versions, by their signatures."""
    from adapter_store.signing import Kind, check_shown

    with told():
        client = tenant_client(url, key)
        found = _with_all_versions(client, name.partition("@")[0])
        public = signing_keys(keys, client)
        versions = [v for v in found["versions"] if name in (found["name"], f"{found['name']}@{v['number']}")]
        if not versions:
            raise ConfigurationError(f"{name} does not exist.")
        rows = []
        for version in versions:
            if version["signature"] is None:
                raise ConfigurationError(f"{found['name']}@{version['number']} is from before there were signatures.")
            shown = {"adapter": found["name"], **{name: version[name] for name in ("number", "digest", "published_by")}}
            rows.append(check_shown(shown, version["signature"], public, Kind.VERSION))
    show_table(rows, as_json, ("adapter", "number", "digest", "published_by", "provenance", "created_at"))


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="An adapter's name, or the base model's.")],
    text: Annotated[str, typer.Argument(help="What the user says.")],
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer.")] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Ask a model and stream its answer."""
    parameters: dict[str, Any] = {"temperature": temperature}
    if max_tokens is not None:
        parameters["max_tokens"] = max_tokens
    said = []
    with told():
        for piece in tenant_client(url, key).chat(model, text, **parameters):
            said.append(piece)
            if not as_json:
                print(piece, end="", flush=True)
    show({"model": model, "content": "".join(said)}, as_json, "")
