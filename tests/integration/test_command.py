"""The `tailor` command as a person meets it: help, and what it says when something is not as it should be."""

import json
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gateway.cli import app as command
from gateway.database import HEAD
from tests.bad_adapters import write_base
from tests.storage import clean_environment

TAILOR = str(Path(sys.executable).parent / "tailor")
VERBS = [
    [], ["up"], ["restart"], ["gateway"], ["replica"], ["tenant"], ["tenant", "create"], ["tenant", "list"],
    ["tenant", "update"], ["plan"], ["plan", "update"], ["key", "rotate"], ["adapter", "fallback"], ["key"],
    ["key", "create"], ["key", "list"], ["key", "revoke"], ["adapter"], ["adapter", "push"], ["adapter", "check"],
    ["adapter", "list"], ["adapter", "show"], ["adapter", "delete"], ["adapter", "verify"], ["train"], ["base"],
    ["base", "tiny"], ["base", "show"], ["chat"], ["demo"], ["backup"], ["restore"], ["store"], ["store", "migrate"],
    ["store", "scrub"], ["erasure"], ["erasure", "list"], ["erasure", "show"], ["erasure", "verify"],
]  # fmt: skip


def tailor(home: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**clean_environment(), "TAILOR_HOME": str(home), **settings}
    return subprocess.run(
        [TAILOR, *arguments], env=environment, cwd=home.parent, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb_explains_itself(home: Path, verb: list[str]) -> None:
    """--help works everywhere, makes nothing, and says what the verb does."""
    done = CliRunner().invoke(command, [*verb, "--help"], env={"TAILOR_HOME": str(home)})
    assert done.exit_code == 0
    assert "Usage" in done.stdout
    assert not home.exists()


def test_it_is_installed_as_a_command(home: Path) -> None:
    """Under its name, in a process of its own."""
    done = tailor(home, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "Usage: tailor" in done.stdout


def said(done: subprocess.CompletedProcess[str]) -> str:
    """What an unhappy end told the person: one message, no traceback, a status that scripts can see."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.startswith("tailor: ")
    assert "Traceback" not in done.stderr
    return done.stderr


def test_without_a_gateway_it_says_where_it_looked(home: Path) -> None:
    """And how to start one."""
    told = said(tailor(home, "tenant", "list", TAILOR_OPERATOR_KEY="sk-x", TAILOR_URL="http://127.0.0.1:9"))
    assert "http://127.0.0.1:9" in told
    assert "tailor up" in told
    assert "TAILOR_OPERATOR_KEY" in said(tailor(home, "tenant", "list"))
    assert "TAILOR_API_KEY" in said(tailor(home, "adapter", "list"))


def test_whose_keys_are_meant_must_be_said(home: Path) -> None:
    """A tenant's, one's own tenant's or operators'; and a limit is a number or none."""
    assert "--self" in said(tailor(home, "key", "create", TAILOR_OPERATOR_KEY="sk-x"))
    assert "--self" in said(tailor(home, "key", "list", "acme", "--self", TAILOR_API_KEY="sk-x"))
    assert "TAILOR_API_KEY" in said(tailor(home, "key", "list", "--self"))
    told = said(tailor(home, "plan", "create", "gold", "--tokens-per-month", "many", TAILOR_OPERATOR_KEY="sk-x"))
    assert "--tokens-per-month" in told


def test_a_base_model_that_is_not_there_is_named(home: Path) -> None:
    """By the path that was given, or by the setting that is missing."""
    assert "/no/such/model" in said(tailor(home, "up", "--base-model", "/no/such/model"))
    assert "TAILOR_BASE_MODEL" in said(tailor(home, "up"))
    assert "TAILOR_BASE_MODEL" in said(tailor(home, "gateway"))
    empty = home.parent / "empty"
    empty.mkdir()
    assert "config.json" in said(tailor(home, "gateway", "--base-model", str(empty)))


def test_a_port_in_use_is_told_before_anything_starts(home: Path, tmp_path: Path) -> None:
    """By number, with what to do."""
    base = write_base(tmp_path / "base")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for verb in ("up", "gateway"):
            told = said(tailor(home, verb, "--base-model", str(base), "--port", port))
            assert f"Port {port}" in told
            assert "TAILOR_PORT" in told


def test_all_faulty_settings_are_told_at_once(home: Path) -> None:
    """Each by the name under which it is set."""
    faults = {"TAILOR_PORT": "70000", "TAILOR_ADAPTER_SLOTS": "0", "TAILOR_REPLICAS": "ftp://x", "TAILOR_DTYPE": "int3"}
    told = said(tailor(home, "gateway", **faults))
    assert all(name in told for name in faults)


def test_several_workers_need_a_place_to_count_together(home: Path) -> None:
    """Limits that each worker keeps for itself would be as many times as high."""
    for verb in ("up", "gateway"):
        assert "TAILOR_REDIS_URL" in said(tailor(home, verb, "--workers", "2"))


def test_without_a_stack_there_is_nothing_to_restart(home: Path) -> None:
    """And it says whose stack it looked for."""
    assert str(home) in said(tailor(home, "restart"))


def test_a_public_address_must_be_meant(home: Path, tmp_path: Path) -> None:
    """Listening beyond this machine asks for a second setting."""
    base = str(write_base(tmp_path / "base"))
    for setting in ("TAILOR_HOST", "TAILOR_OPERATOR_HOST"):
        assert "TAILOR_ALLOW_PUBLIC" in said(tailor(home, "gateway", "--base-model", base, **{setting: "0.0.0.0"}))


def test_a_folder_without_an_adapter_is_named(home: Path, tmp_path: Path) -> None:
    """Before anything is sent."""
    told = said(tailor(home, "adapter", "push", str(tmp_path), TAILOR_API_KEY="sk-x"))
    assert str(tmp_path / "adapter_config.json") in told


def test_a_bad_hyperparameter_is_named_as_it_was_typed(home: Path, tmp_path: Path) -> None:
    """Before any training, and nothing is made."""
    base, out = write_base(tmp_path / "base"), tmp_path / "out"
    told = said(tailor(home, "train", "data.jsonl", "--base", str(base), "--out", str(out), "--rank", "0"))
    assert "--rank" in told
    assert not out.exists()


def test_an_output_folder_that_exists_is_never_touched(home: Path, tmp_path: Path) -> None:
    """It may be somebody's work."""
    out = tmp_path / "taken"
    out.mkdir()
    assert str(out) in said(tailor(home, "base", "tiny", "--out", str(out), "--json"))
    assert list(out.iterdir()) == []


@pytest.mark.local
def test_a_home_is_backed_up_and_restored(home: Path, tmp_path: Path) -> None:
    """Backup, check and restore from the command line, into another home; a second restore is refused."""
    assert tailor(home, "store", "migrate").stdout == f"the schema is {HEAD}\n"
    target = str(tmp_path / "backups")
    made = json.loads(tailor(home, "backup", target, "--keep", "3", "--json").stdout)
    assert (made["rows"], made["blobs"]) == (2, 0)  # the default plan and the change counter
    assert "is whole: 2 rows" in tailor(home, "restore", target, "--check").stdout
    other = home.with_name("other")
    assert f"{made['snapshot']} restored: 2 rows" in tailor(other, "restore", target).stdout
    with sqlite3.connect(other / "tailor.db") as database:
        database.execute("INSERT INTO tenants (id, name, created_at) VALUES ('t', 'acme', 1)")
    database.close()
    refused = tailor(other, "restore", target)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "tailor: the database is not empty" in refused.stderr
    assert tailor(other, "restore", target, "--force").returncode == 0
