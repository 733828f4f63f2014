"""`tailor adapter proof` and `tailor adapter prompts`: whether a version does anything."""

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from gateway.commands.common import Json, Key, Url, adapter_path, fail, show, tenant_client, told
from gateway.home import ConfigurationError

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
        adapter = adapter_path(name)
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
    examples: Annotated[
        Path | None, typer.Option(help='Good answers, a line each: {"prompt": "…", "answer": "…"}.')
    ] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Show or set what an adapter's proofs ask."""
    if file is not None and generated:
        fail("Name a file or --generated, not both.")
    with told():
        client = tenant_client(url, key)
        path = adapter_path(name, "prompts")
        found = client.call("GET", path)
        if file is not None or generated or examples is not None:
            lines = [] if found["generated"] or generated else found["prompts"]
            if file is not None:
                lines = [line for line in file.read_text().splitlines() if line.strip()]
            body = {"prompts": lines} if examples is None else {"prompts": lines, "examples": _examples(examples)}
            found = client.call("PUT", path, body)
    show(found, as_json, "\n".join(found["prompts"]))


def _examples(file: Path) -> list[dict[str, str]]:
    found = []
    for number, line in enumerate(file.read_text().splitlines(), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError:
                raise ConfigurationError(f"{file}, line {number} is not JSON.") from None
    return found


def _sentence(proof: dict[str, Any]) -> str:
    told = f"{proof['adapter']}@{proof['version']}: {proof['status']}"
    if proof["reason"] is not None:
        told += f" ({proof['reason']})"
    if proof["max_logprob_difference"] is not None:
        told += f", {proof['max_logprob_difference']:.4g} from the base over {proof['prompts']} prompts"
    if proof["refused_examples"]:
        places = ", ".join(f"examples[{place}]" for place in proof["refused_examples"])
        told += f"; the engine refuses {places}"
    return told
