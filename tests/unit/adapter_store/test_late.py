"""Modules that run when they are used."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

from adapter_store.late import import_when_used


def test_a_module_that_could_not_run_tells_it_each_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not that a name is missing; once it can, it does."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "late_and_faulty.py").write_text("import late_and_missing\nNAME = 1\n")
    import_when_used("late_and_faulty")
    try:
        late = import_module("late_and_faulty")
        for _ in range(2):
            with pytest.raises(ModuleNotFoundError, match="late_and_missing"):
                late.NAME  # noqa: B018
        (tmp_path / "late_and_missing.py").touch()
        assert late.NAME == 1
    finally:
        for name in ("late_and_faulty", "late_and_missing"):
            sys.modules.pop(name, None)
