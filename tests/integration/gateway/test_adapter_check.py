"""`tailor adapter check`: the server's verdict on the tenant's own machine, with the server's help or without."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from adapter_store.base_description import read_base, read_description
from adapter_store.base_model import BaseModel
from adapter_store.errors import BaseModelInvalid
from adapter_store.inspection import inspect
from tests.bad_adapters import BAD, HIDDEN
from tests.integration.gateway.conftest import Tenant

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "dtype": "float32", "hidden_size": HIDDEN, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
}  # fmt: skip
# The command, and whether it has loaded what is too heavy for a tenant's own machine.
PROGRAM = """
import sys
from gateway.cli import app
try:
    app(standalone_mode=True)
finally:
    assert {"torch", "peft", "transformers", "vllm", "sqlalchemy"} & sys.modules.keys() == set()
"""


def check(folder: Path, *arguments: str, **settings: str) -> "subprocess.CompletedProcess[str]":
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TAILOR_")}
    command = [sys.executable, "-c", PROGRAM, "adapter", "check", str(folder), *arguments]
    return subprocess.run(
        command, env={**kept, **settings}, capture_output=True, text=True, timeout=120, check=False, cwd=folder.parent
    )


@pytest.fixture
async def description(acme: Tenant) -> dict[str, Any]:
    answer = await acme.client.get("/v1/base-model")
    assert answer.status_code == 200
    found: dict[str, Any] = answer.json()
    return found


async def test_the_servers_description_gives_the_servers_verdict(
    acme: Tenant, description: dict[str, Any], base: BaseModel, good: Path, tmp_path: Path
) -> None:
    """Every tenth bad adapter has the same faults, field by field, at home and as the server's answer."""
    against, bounds = read_description(description, source="test")
    assert against == base
    assert inspect(good, against, bounds).faults == ()
    compared = 0
    for bad in [bad for bad in BAD if bad.served_as in (None, "float32")][::10]:
        folder = bad.make(good, tmp_path / bad.name)
        answer = await acme.publish(folder)
        if answer.status_code == 422:
            told = [tuple(fault.values()) for fault in answer.json()["error"]["faults"]]
            at_home = [
                (f.code, f.where, f.tensor, f.field, f.found, f.expected, f.hint)
                for f in inspect(folder, against, bounds).faults
            ]
            assert told == at_home
            compared += 1
    assert compared >= 8


async def test_the_command_asks_the_gateway(acme: Tenant, good: Path, tmp_path: Path) -> None:
    """Status 0 and what it is; status 1 and every fault, for people and as JSON; without torch."""
    settings = {"TAILOR_API_KEY": acme.key, "TAILOR_URL": str(acme.client.base_url)}
    fit = await asyncio.to_thread(check, good, **settings)
    assert (fit.returncode, fit.stderr) == (0, "")
    assert "fit to be served on base: rank 8" in fit.stdout
    bad = next(bad for bad in BAD if bad.name == "one_nan").make(good, tmp_path / "bad")
    refused = await asyncio.to_thread(check, bad, **settings)
    assert refused.returncode == 1
    assert refused.stderr.startswith("tailor: ")
    assert "not_finite: adapter_model.safetensors:base_model" in refused.stderr
    as_json = await asyncio.to_thread(check, bad, "--json", **settings)
    assert as_json.returncode == 1
    (fault,) = json.loads(as_json.stdout)["faults"]
    assert fault.keys() == {"code", "where", "tensor", "field", "found", "expected", "hint"}
    assert (fault["code"], fault["field"]) == ("not_finite", None)


async def test_the_command_needs_no_server(description: dict[str, Any], good: Path, tmp_path: Path) -> None:
    """A saved description does, and so does a config.json; what cannot be compared without weights is said."""
    saved = tmp_path / "base.json"
    saved.write_text(json.dumps(description))
    assert check(good, "--base", str(saved)).returncode == 0
    assert "rank_too_high" in check(good, "--base", str(saved), "--max-rank", "4").stderr
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    done = check(good, "--base", str(folder), "--json")
    assert done.returncode == 0, done.stderr
    assert "fingerprint" in json.loads(done.stdout)["not_checked"][0]


def test_config_json_gives_the_widths(base: BaseModel, tmp_path: Path) -> None:
    """The layers that are read from config.json alone are those of the weights' headers."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    against, _ = read_base(tmp_path, name="base")
    assert against.modules == base.modules
    assert (against.dtype, against.architecture) == (base.dtype, base.architecture)


@pytest.mark.parametrize(
    ("members", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"head_dim": "wide"}, "head_dim"),
        ({"dtype": "int8"}, "int8"),
    ],
)
def test_a_config_that_does_not_tell_is_refused(members: dict[str, Any], named: str, tmp_path: Path) -> None:
    """The error names what is missing."""
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **members}))
    with pytest.raises(BaseModelInvalid, match=named):
        read_base(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"name": 1}', '{"name": "base", "modules": {"a": [1]}}'])
def test_a_file_that_is_no_description_is_refused(text: str, tmp_path: Path) -> None:
    """The error names the file."""
    path = tmp_path / "base.json"
    path.write_text(text)
    with pytest.raises(BaseModelInvalid, match=r"base\.json"):
        read_base(path)
