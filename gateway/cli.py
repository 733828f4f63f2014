"""The `tailor` command. Each part is imported only when its verb runs, so that `tailor --help` is quick anywhere."""

import asyncio
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError

from gateway.home import ConfigurationError, Home
from gateway.settings import Settings, explain

app = typer.Typer(help="One base model and a fitted adapter for every tenant.", no_args_is_help=True)
tenant_app = typer.Typer(help="Tenants (with an operator's key).", no_args_is_help=True)
key_app = typer.Typer(help="API keys of tenants (with an operator's key).", no_args_is_help=True)
adapter_app = typer.Typer(help="A tenant's adapters (with the tenant's key).", no_args_is_help=True)
base_app = typer.Typer(help="Base models.", no_args_is_help=True)
app.add_typer(tenant_app, name="tenant")
app.add_typer(key_app, name="key")
app.add_typer(adapter_app, name="adapter")
app.add_typer(base_app, name="base")

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Url = Annotated[str | None, typer.Option(envvar="TAILOR_URL", help="Where the gateway is.", show_default=False)]
Key = Annotated[str | None, typer.Option(envvar="TAILOR_API_KEY", help="The tenant's API key.", show_default=False)]
OperatorKey = Annotated[
    str | None,
    typer.Option(
        "--key",
        envvar="TAILOR_OPERATOR_KEY",
        help="An operator's key; default: the one in the home folder.",
        show_default=False,
    ),
]


def main() -> None:
    """The console script."""
    try:
        app(standalone_mode=True)
    except KeyboardInterrupt:
        sys.exit(130)


# the servers


@app.command()
def up(
    base_model: Annotated[str | None, typer.Option(help="Folder or Hugging Face id of the base model.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the gateway.")] = None,
) -> None:
    """Run the whole stack on this machine until Ctrl-C: engine and gateway, supervised."""
    from gateway.stack import run_up

    with _told():
        asyncio.run(run_up(_settings(base_model=base_model, port=port), lambda text: print(text, flush=True)))


@app.command()
def gateway(
    base_model: Annotated[str | None, typer.Option(help="Folder or Hugging Face id of the base model.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
) -> None:
    """Become a gateway; TAILOR_REPLICAS says where its replicas are."""
    with _told():
        settings = _settings(base_model=base_model, port=port)
        given = {"TAILOR_PORT": str(settings.port)}
        if settings.base_model is not None:
            given["TAILOR_BASE_MODEL"] = settings.base_model
        command = [sys.executable, "-m", "gateway.server"]
        os.execve(command[0], command, {**os.environ, **given})  # noqa: S606  a server without the command's weight


@app.command()
def replica(
    base_model: Annotated[str | None, typer.Option(help="Folder or Hugging Face id of the base model.")] = None,
    listen: Annotated[str | None, typer.Option(help="unix:/path or host:port.")] = None,
) -> None:
    """Become a replica: vLLM with the agent in it. Restarting it is its supervisor's work."""
    from gateway.replicas.launch import replica_command

    with _told():
        settings = _settings(base_model=base_model, listen=listen)
        if settings.listen is None or settings.replica_token is None:
            raise ConfigurationError("A replica alone needs TAILOR_LISTEN (or --listen) and TAILOR_REPLICA_TOKEN.")
        home = Home(settings.home)
        base_path, base_name = home.base_model(settings.base_model, settings.base_model_name)
        command, environment = replica_command(
            settings,
            home,
            base_model=base_path,
            base_name=base_name,
            listen=settings.listen,
            token=settings.replica_token.get_secret_value(),
        )
        os.execve(command[0], command, dict(environment))  # noqa: S606  becoming vLLM is the point


# operators


@tenant_app.command("create")
def tenant_create(name: str, url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """Make a tenant."""
    with _told():
        made = _operator(url, key).call("POST", "/admin/v1/tenants", {"name": name})
    _show(
        made,
        as_json,
        f"tenant {made['name']} ({made['id']}); its first key: tailor key create {made['name']}",
    )


@tenant_app.command("list")
def tenant_list(url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """List all tenants."""
    with _told():
        found = _operator(url, key).call("GET", "/admin/v1/tenants")["data"]
    _table(found, as_json, ("name", "id", "created_at"))


@key_app.command("create")
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
    with _told():
        made = _operator(url, key).call("POST", f"/admin/v1/tenants/{_segment(tenant)}/keys", body)
    _show(made, as_json, f"{made['secret']}\n(id {made['id']}; shown this once)")


@key_app.command("list")
def key_list(tenant: str, url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """List a tenant's keys, without their secrets."""
    with _told():
        found = _operator(url, key).call("GET", f"/admin/v1/tenants/{_segment(tenant)}/keys")["data"]
    _table(found, as_json, ("id", "prefix", "label", "scopes", "created_at", "revoked_at"))


@key_app.command("operator")
def key_operator(as_json: Json = False) -> None:
    """Make another operator's key, straight in the database of this machine: for when the last one is lost."""
    with _told():
        from gateway.tenants import make_operator_key

        settings = _settings()
        made = asyncio.run(make_operator_key(settings.database))
        Home(settings.home).keep_operator_key(made)
    _show({"secret": made}, as_json, f"{made}\n(kept in {settings.home / 'operator-key'})")


@key_app.command("revoke")
def key_revoke(key_id: str, url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """Revoke a key for good."""
    with _told():
        _operator(url, key).call("DELETE", f"/admin/v1/keys/{_segment(key_id)}")
    _show({"id": key_id, "revoked": True}, as_json, f"{key_id} is revoked")


# tenants


@adapter_app.command("push")
def adapter_push(
    folder: Annotated[Path, typer.Argument(help="Folder with adapter_config.json and adapter_model.safetensors.")],
    name: Annotated[str | None, typer.Option(help="What requests call it; default: the folder's name.")] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Publish an adapter: checked, stored, and served from the next request on."""
    with _told():
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (folder / file).is_file():
                raise ConfigurationError(f"{folder / file} does not exist: name the folder that PEFT saved.")
        made = _tenant(url, key).push(name or folder.resolve().name, folder)
    current = made["current"]
    _show(
        made,
        as_json,
        f"{made['name']}@{current['number']}: rank {current['rank']}, {current['bytes']:,} bytes",
    )


@adapter_app.command("list")
def adapter_list(url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """List the tenant's adapters."""
    with _told():
        client = _tenant(url, key)
        found: list[dict[str, Any]] = []
        page = client.call("GET", "/v1/adapters?limit=1000")
        found += page["data"]
        while page["has_more"]:
            page = client.call("GET", "/v1/adapters", params={"limit": 1000, "after": found[-1]["name"]})
            found += page["data"]
    rows = [{**adapter["current"], **adapter} for adapter in found]
    _table(found if as_json else rows, as_json, ("name", "number", "rank", "bytes", "created_at"))


@adapter_app.command("show")
def adapter_show(name: str, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Show one adapter with its versions."""
    with _told():
        found = _tenant(url, key).call("GET", f"/v1/adapters/{_segment(name)}")
    if as_json:
        _table(found, True, ())
    else:
        _table(found["versions"], False, ("number", "digest", "rank", "bytes", "created_at"))


@adapter_app.command("delete")
def adapter_delete(name: str, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Delete an adapter with all its versions."""
    with _told():
        _tenant(url, key).call("DELETE", f"/v1/adapters/{_segment(name)}")
    _show({"name": name, "deleted": True}, as_json, f"{name} is deleted")


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
    with _told():
        for piece in _tenant(url, key).chat(model, text, **parameters):
            said.append(piece)
            if not as_json:
                print(piece, end="", flush=True)
    _show({"model": model, "content": "".join(said)}, as_json, "")


# training


@app.command()
def train(
    data: Annotated[Path, typer.Argument(help="Chat JSONL, as OpenAI's fine-tuning takes it.")],
    base: Annotated[Path, typer.Option(help="Folder of the base model.")],
    out: Annotated[Path, typer.Option(help="Folder to make for the adapter.")],
    rank: Annotated[int | None, typer.Option(help="LoRA rank.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the data.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples in a step.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal bytes.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; equal numbers give equal bytes.")] = None,
    as_json: Json = False,
) -> None:
    """Train a LoRA adapter on this machine; publish it with `tailor adapter push`."""
    given = {
        "rank": rank,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
    }
    with _told(), _progress() as on_progress:
        from gateway.local_training import train_adapter

        report = train_adapter(
            data, base, out, {name: value for name, value in given.items() if value is not None}, on_progress, threads
        )
    _show(report, as_json, f"{out}: loss {report['final_loss']:.4f} after {report['steps']} steps; next: "
          f"tailor adapter push {out} --name NAME")  # fmt: skip


@base_app.command("tiny")
def base_tiny(
    out: Annotated[Path, typer.Option(help="Folder to make.")],
    seed: Annotated[int, typer.Option(help="Equal seeds give equal bytes.")] = 0,
    as_json: Json = False,
) -> None:
    """Build a small Llama from a seed, without any download, to try everything with."""
    with _told(), _progress() as on_progress:
        from gateway.local_training import build_tiny_base

        report = build_tiny_base(out, seed, on_progress)
    _show(report, as_json, f"{out}: held-out accuracy {report['heldout_accuracy']:.3f}")


@app.command()
def demo(as_json: Json = False) -> None:
    """Two tenants, one base, end to end on a real engine; writes demo.json into the home folder."""
    from gateway.demo import run_demo

    with _told():
        report = run_demo(_settings(), quiet=as_json)
    if as_json:
        _table(report, True, ())


# shared


@contextmanager
def _told() -> Iterator[None]:
    """What a person can mend is told in its own words, without a traceback."""
    from gateway.api_client import ApiError

    try:
        yield
    except (ConfigurationError, ApiError) as error:
        _fail(str(error))
    except ValidationError as error:
        _fail(explain(error))
    except OSError as error:
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except Exception as error:
        if not _is_ours(error):
            raise
        _fail(str(error))


def _is_ours(error: Exception) -> bool:
    """Errors of the store and of training carry text for the person who made them."""
    return type(error).__module__.partition(".")[0] in ("adapter_store", "training")


def _fail(message: str) -> None:
    print(f"tailor: {message}", file=sys.stderr)
    raise typer.Exit(1)


def _settings(**given: object) -> Settings:
    return Settings(**{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]


def _operator(url: str | None, key: str | None) -> Any:
    from gateway.api_client import ApiClient

    settings = _settings()
    key = key or Home(settings.home).operator_key()
    if key is None:
        raise ConfigurationError(
            f"No operator key: set TAILOR_OPERATOR_KEY, or run where {settings.home / 'operator-key'} is."
        )
    return ApiClient(url or settings.url, key)


def _tenant(url: str | None, key: str | None) -> Any:
    from gateway.api_client import ApiClient

    if key is None:
        raise ConfigurationError("No API key: set TAILOR_API_KEY or pass --key.")
    return ApiClient(url or _settings().url, key)


def _segment(text: str) -> str:
    from urllib.parse import quote

    return quote(text, safe="")


def _show(result: Any, as_json: bool, text: str) -> None:
    print(json.dumps(result, indent=2) if as_json else text)


def _table(rows: Any, as_json: bool, columns: tuple[str, ...]) -> None:
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold")  # an id that is cut short is of no use
    for row in rows:
        table.add_row(*(_cell(row.get(column), column) for column in columns))
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _cell(value: Any, column: str) -> str:
    if value is None:
        return ""
    if column.endswith("_at"):
        from datetime import UTC, datetime

        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M")
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


@contextmanager
def _progress() -> Iterator[Callable[[Any], None]]:
    """A progress bar on standard error, fed with `training.progress.Progress`."""
    from gateway.progress_bar import progress_bar

    with progress_bar() as on_progress:
        yield on_progress


if __name__ == "__main__":
    main()
