"""The compiled form of the hot modules is used where it is true, and only there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gateway import compiled
from gateway.compile import lacking

PROGRAM = "from gateway import compiled, fairness; print(compiled.state(), fairness.__file__)"


def told(**environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return found.stdout


def test_these_tests_run_what_is_shipped() -> None:
    """`make test` compiles first, wherever that can be done; `TAILOR_INTERPRETED=1` is `make check`'s."""
    if lacking() is None and os.environ.get(compiled.INTERPRETED, "0") == "0":
        assert compiled.state() == "compiled", "run make compile"
        assert "tailor_compiled" in told()


def test_the_interpreter_can_be_asked_for() -> None:
    assert told(TAILOR_INTERPRETED="1").startswith("interpreted ")


def test_other_source_is_interpreted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edit is never hidden by what was compiled before it."""
    made_of = tmp_path / "made-of"
    made_of.write_text("of other source")
    monkeypatch.setattr(compiled, "MADE_OF", made_of)
    monkeypatch.setattr(sys, "meta_path", [finder for finder in sys.meta_path if finder is not compiled._FINDER])
    monkeypatch.delenv(compiled.INTERPRETED, raising=False)
    compiled.use()
    assert compiled.state() == "interpreted: it was compiled of other source"


def test_a_change_anywhere_in_the_packages_is_seen(tmp_path: Path) -> None:
    """Constants of modules that are not compiled themselves are in the compiled code too."""
    for package in compiled.PACKAGES:
        (tmp_path / package).mkdir()
    constant = tmp_path / "adapter_store" / "constants.py"
    constant.write_text("LIMIT = 1")
    before = compiled.digest(tmp_path)
    constant.write_text("LIMIT = 2")
    assert compiled.digest(tmp_path) != before


def test_every_hot_module_exists() -> None:
    assert all(compiled.source_of(name).exists() for name in compiled.HOT)
