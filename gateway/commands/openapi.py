"""`tailor openapi`: the gateway's API as a file."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def openapi(
    out: Annotated[Path | None, typer.Option(help="File to write; default: standard output.")] = None,
) -> None:
    """Write the gateway's OpenAPI document."""
    from gateway.openapi import document

    text = json.dumps(document(), indent=2) + "\n"
    if out is None:
        print(text, end="")
    else:
        out.write_text(text)
