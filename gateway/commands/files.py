"""`tailor file`: a tenant's training files, and what jobs have made of them."""

import sys
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import typer

from gateway.commands.common import Json, Key, Url, pages, segment, show, show_table, tenant_client, told
from gateway.home import ConfigurationError

app = typer.Typer(help="Training files (with the tenant's key).", no_args_is_help=True)

FileId = Annotated[str, typer.Argument(metavar="ID", help="As `tailor file list` shows it: file-…")]


@app.command("put")
def file_put(
    path: Annotated[Path, typer.Argument(help="A JSONL file, an example on each line.")],
    purpose: Annotated[str, typer.Option(help="What it is for.")] = "fine-tune",
    expires_after_s: Annotated[
        int | None, typer.Option(help="When it goes by itself, after so many seconds.", show_default=False)
    ] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Upload a file: it is checked line by line, and every fault is told at once."""
    from gateway.push import shown
    from gateway.push_file import PushFile

    with told():
        if not path.is_file():
            raise ConfigurationError(f"{path} is no file.")
        client = tenant_client(url, key)
        with shown() as stage:
            made = PushFile(client, path, stage=stage, purpose=purpose, expires_after_s=expires_after_s).run()
    show(made, as_json, _described(made))


@app.command("list")
def file_list(url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """List the files, the newest first."""
    with told():
        found = pages(tenant_client(url, key), "/v1/files", "id")
    show_table(found, as_json, ("id", "filename", "purpose", "bytes", "created_at", "expires_at"))


@app.command("show")
def file_show(file_id: FileId, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Show a file, and what the check found in it."""
    with told():
        found = tenant_client(url, key).call("GET", f"/v1/files/{segment(file_id)}")
    show(found, as_json, _described(found))


@app.command("get")
def file_get(
    file_id: FileId,
    out: Annotated[Path | None, typer.Option(help="Where to write it; default: standard output.")] = None,
    url: Url = None,
    key: Key = None,
) -> None:
    """Write a file's content."""
    with told():
        client, place = tenant_client(url, key), f"/v1/files/{segment(file_id)}/content"
        if out is None:
            client.download(place, sys.stdout.buffer)
            return
        with out.open("xb") as target:
            _download(client, place, target, out)


def _download(client: Any, place: str, target: BinaryIO, out: Path) -> None:
    """Nothing is left of what breaks off."""
    try:
        client.download(place, target)
    except BaseException:
        out.unlink()
        raise


@app.command("delete")
def file_delete(
    file_id: FileId,
    force: Annotated[bool, typer.Option("--force", help="Though a job needs it.")] = False,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Erase a file; the receipt says so."""
    with told():
        gone = tenant_client(url, key).call("DELETE", f"/v1/files/{segment(file_id)}", params={"force": force})
    show(gone, as_json, f"{file_id} is erased; receipt: tailor erasure show {gone['tailor']['erasure']}")


def _described(file: dict[str, Any]) -> str:
    """A file in some lines: its name and size, figures, and a line for each warning."""
    lines = [f"{file['id']}: {file['filename']}, {file['bytes']:,} bytes, {file['purpose']}"]
    report = file["tailor"]["report"]
    if report is not None:
        statistics = report["statistics"]
        tokens = statistics["tokens"]
        counted = f", {tokens['total']:,} tokens of which {tokens['trained']:,} are trained on" if tokens else ""
        lines.append(f"  {statistics['examples']:,} examples ({report['method']}){counted}")
        for warning in report["warnings"]:
            first = ", ".join(map(str, warning["lines"][:10])) + (", …" if warning["count"] > 10 else "")
            lines.append(f"  warning: {warning['kind']} in {warning['count']:,} rows, lines {first}")
    return "\n".join(lines)
