"""Rows as CSV that a spreadsheet takes for text and numbers only."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import Final

FORMULAS: Final = ("=", "+", "-", "@", "\t", "\r")


def csv_of(names: Sequence[str], rows: Iterable[Sequence[int | str | None]]) -> str:
    """A line of names, then the rows; None is empty."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: int | str | None) -> int | str | None:
    """A text that would be taken for a formula is marked as text."""
    return "'" + value if isinstance(value, str) and value.startswith(FORMULAS) else value
