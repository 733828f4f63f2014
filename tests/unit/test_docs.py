"""The documents say what the code does."""

import re
from pathlib import Path

from gateway.settings import Settings

PROJECT = Path(__file__).parents[2]
SETTINGS = dict(
    re.findall(r"^\| `(TAILOR_[A-Z_]+)` \| ([^|]*) \|", (PROJECT / "docs/operations.md").read_text(), re.MULTILINE)
)
"""The table's names and defaults."""
WITHOUT_VALUE = {
    "file_expiry_s": "never",
    "training_workers": "1 where torch is installed",
    "training_threads": "all, or 1 for a tiny base",
}
"""What is done where these are not set, said in the place of a default."""
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def test_every_setting_is_documented() -> None:
    """By its environment name, in the table of docs/operations.md, and no setting is documented that is gone."""
    assert SETTINGS.keys() == {f"TAILOR_{name.upper()}" for name in Settings.model_fields}


def spelled(default: str) -> str:
    """A size in bytes, where the table says one with its unit."""
    number, _, unit = default.partition(" ")
    return str(int(number) * UNITS[unit]) if unit in UNITS else default


def test_every_settings_default_is_documented() -> None:
    """As the settings have it."""
    defaults = {}
    for name, field in Settings.model_fields.items():
        value = field.get_default(call_default_factory=True)
        told = WITHOUT_VALUE.get(name, "—") if value is None else "none" if value == () else str(value)
        defaults[f"TAILOR_{name.upper()}"] = told
    assert {name: spelled(default) for name, default in SETTINGS.items()} == defaults


def test_every_setting_says_what_it_is() -> None:
    """The description is what the table is made of."""
    assert all(field.description for field in Settings.model_fields.values())


def test_links_between_documents_hold() -> None:
    """Every relative link leads to a file."""
    for document in (*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name} → {target}"


def test_the_make_targets_that_documents_name_exist() -> None:
    """`make demo` and its like."""
    makefile = (PROJECT / "Makefile").read_text()
    for document in (*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")):
        for target in re.findall(r"(?:^|`)make ([a-z-]+)", document.read_text(), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{document.name}: make {target}"
