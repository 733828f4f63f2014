"""A benchmark's figures: what each must keep, the verdict on a value, and how both are written."""

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Bound:
    """What a figure must keep and what it aims at; `better` says on which side of them good is."""

    must: float
    aim: float | None
    better: Literal["lower", "higher"]
    text: str


@dataclass(frozen=True, slots=True)
class Row:
    """One figure with its verdict."""

    figure: str
    value: float
    bound: Bound
    detail: dict[str, object]

    @property
    def ok(self) -> bool:
        """Whether the must is kept; on the bound itself it is."""
        must = self.bound.must
        return self.value <= must if self.bound.better == "lower" else self.value >= must

    def line(self) -> str:
        """As one JSON object; what the figure was made of stands behind its verdict."""
        bound = self.bound
        verdict = {"must": bound.must, "aim": bound.aim, "better": bound.better, "ok": self.ok}
        return json.dumps(
            {"figure": self.figure, "value": round(self.value, 4), **verdict, **self.detail}, ensure_ascii=False
        )


def tell(rows: Iterable[Row]) -> None:
    """A line a figure, each as soon as it is known."""
    for one in rows:
        sys.stdout.write(f"{one.line()}\n")
        sys.stdout.flush()


def add_files(parser: argparse.ArgumentParser) -> None:
    """The options that `write` reads."""
    parser.add_argument("--report", type=Path, help="write everything to this file, as JSON")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")


def write(rows: Sequence[Row], args: argparse.Namespace, about: Mapping[str, object]) -> None:
    """The files that were asked for; `about`: what the report has beside the figures."""
    if args.report is not None:
        told = {"figures": [json.loads(one.line()) for one in rows], **about}
        args.report.write_text(json.dumps(told, indent=1, ensure_ascii=False))
    if args.markdown is not None:
        args.markdown.write_text(markdown(rows))


def exit_code(rows: Iterable[Row]) -> int:
    """1 where a must is missed."""
    return 0 if all(one.ok for one in rows) else 1


def markdown(rows: Sequence[Row]) -> str:
    """The table of docs/benchmarks.md."""
    lines = ["| figure | value | must | aim |", "| --- | --- | --- | --- |"]
    for one in rows:
        bound = one.bound
        sign = "≤" if bound.better == "lower" else "≥"
        aim = "" if bound.aim is None else f"{sign} {bound.aim:g}"
        lines.append(f"| {bound.text} | {one.value:.4g} | {sign} {bound.must:g} | {aim} |")
    return "\n".join(lines) + "\n"
