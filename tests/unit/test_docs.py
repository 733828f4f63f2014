"""The documents say what the code does."""

import re
from pathlib import Path

from gateway.settings import Settings

PROJECT = Path(__file__).parents[2]


def test_every_setting_is_documented() -> None:
    """By its environment name, in the table of docs/operations.md, and no setting is documented that is gone."""
    documented = set(re.findall(r"^\| `(TAILOR_[A-Z_]+)`", (PROJECT / "docs/operations.md").read_text(), re.MULTILINE))
    assert documented == {f"TAILOR_{name.upper()}" for name in Settings.model_fields}


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
