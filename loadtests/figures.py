"""A benchmark's figures: what each must keep, the verdict on a value, and how both are written."""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
