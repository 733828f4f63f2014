"""Runs the in-process measurement of resolve + admit; it lives with the tests, since it imports what it measures."""

from loadtests.overhead.report import Row


def scale_rows(*, quick: bool) -> list[Row]:
    return []
