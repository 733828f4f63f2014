"""`tailor adapter proof` and `tailor adapter prompts`: whether a version does anything."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from gateway.commands.common import Json, Key, Url, fail, segment, show, tenant_client, told

LOOK_EVERY_S = 0.25


def adapter_proof(
    name: str,
    version: Annotated[int | None, typer.Option(help="Its number; default: the current one.")] = None,
    again: Annotated[bool, typer.Option("--again", help="Prove it again, from nothing.")] = False,
    wait_s: Annotated[float, typer.Option("--wait", help="Wait so many seconds for a verdict.")] = 0.0,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show whether a version is proved: that it answers otherwise than the base, and always the same."""
    with told():
        client = tenant_client(url, key)
        adapter = f"/v1/adapters/{segment(name)}"
        if version is None:
            version = client.call("GET", adapter)["current"]["number"]
        path = f"{adapter}/versions/{version}/proof"
        proof = client.call("POST" if again else "GET", path)
        deadline = time.monotonic() + wait_s
        while proof["status"] == "pending" and time.monotonic() < deadline:
            time.sleep(LOOK_EVERY_S)
            proof = client.call("GET", path)
    show(proof, as_json, _sentence(proof))


def adapter_prompts(
    name: str,
    file: Annotated[Path | None, typer.Argument(help="Text, one prompt a line; default: show them.")] = None,
    generated: Annotated[bool, typer.Option("--generated", help="Back to the generated ones.")] = False,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show or set what an adapter's proofs ask."""
    if file is not None and generated:
        fail("Name a file or --generated, not both.")
    with told():
        client = tenant_client(url, key)
        path = f"/v1/adapters/{segment(name)}/prompts"
        if file is None and not generated:
            found = client.call("GET", path)
        else:
            lines = [] if file is None else [line for line in file.read_text().splitlines() if line.strip()]
            found = client.call("PUT", path, {"prompts": lines})
    show(found, as_json, "\n".join(found["prompts"]))


def _sentence(proof: dict[str, Any]) -> str:
    told = f"{proof['adapter']}@{proof['version']}: {proof['status']}"
    if proof["reason"] is not None:
        told += f" ({proof['reason']})"
    if proof["max_logprob_difference"] is not None:
        told += f", {proof['max_logprob_difference']:.4g} from the base over {proof['prompts']} prompts"
    return told
