"""How much of an adapter: which factor keeps most of its task and of what the base could do before.

A factor from 0, the base, to 1, the adapter, scales what the adapter adds (`adapter_store/scaling.py`). Both sets of
examples are answered at each factor; nothing is loaded or trained again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from training.dataset import Row
from training.engine import Engine
from training.evaluation import Questions, as_run

COARSE = tuple(step / 10 for step in range(11))
FINE = 0.02
"""Between the two coarse neighbours of the best."""
DECIMALS = 4


@dataclass(frozen=True, slots=True)
class Point:
    """At one factor: the exact match on the task and on general questions."""

    factor: float
    task: float
    general: float


@dataclass(frozen=True, slots=True)
class Blend:
    """The curve, by factor, and the factor that was picked by the rule that `rule` states."""

    points: tuple[Point, ...]
    picked: Point
    rule: str

    @property
    def kept(self) -> tuple[float, float]:
        """Of the adapter's score on the task, and of the base's on general questions."""
        return _kept(self.picked, self.points[0], self.points[-1])


def blend(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    adapter: Path,
    task: Sequence[Row],
    general: Sequence[Row],
    *,
    least_task: float | None = None,
    on_point: Callable[[Point], None] = lambda point: None,
) -> Blend:
    """Ask at 0, 0.1 … 1, then finer around the best; pick by `picked`.

    Raises:
        ValueError: a set has nothing to be told, or the base or the adapter gets nothing right.
        TrainingFailed: the adapter does not fit the base.
    """
    asked = [Questions(engine, tokenizer, rows) for rows in (task, general)]
    run = as_run(engine, adapter, task[0])
    outer = run.weights[run.layout.inner :]
    whole = outer.clone()
    found: dict[float, Point] = {}

    def ask(factor: float) -> None:
        factor = round(factor, DECIMALS)
        if factor in found:
            return
        torch.mul(whole, factor, out=outer)
        found[factor] = Point(factor, *(questions.scored(run).exact_match for questions in asked))
        on_point(found[factor])

    for factor in COARSE:
        ask(factor)
    best, _ = picked(list(found.values()), least_task)
    steps = round(0.1 / FINE)
    for step in range(-steps + 1, steps):
        if 0 < best.factor + step * FINE < 1:
            ask(best.factor + step * FINE)
    points = sorted(found.values(), key=lambda point: point.factor)
    best, rule = picked(points, least_task)
    return Blend(tuple(points), best, rule)


def picked(points: Sequence[Point], least_task: float | None = None) -> tuple[Point, str]:
    """The best of the points, which have factors 0 and 1 among them, and the rule in words.

    By default where the smaller of two shares is largest: of the adapter's score on the task, and of the base's on
    general questions. With `least_task` the best general score among those that keep that share of the task. Of
    equals the one that does more of the task.

    Raises:
        ValueError: the base or the adapter gets nothing right, so there is no share to keep.
    """
    base, adapter = (next(point for point in points if point.factor == end) for end in (0, 1))
    if base.general == 0 or adapter.task == 0:
        what = "the base no general question" if base.general == 0 else "the adapter no question of its task"
        raise ValueError(f"{what} right: there is nothing to weigh against each other")
    if least_task is None:
        rule = "the smaller of both shares is largest"
        return max(points, key=lambda point: (min(_kept(point, base, adapter)), point.task, point.factor)), rule
    fit = [point for point in points if point.task >= least_task * adapter.task]
    rule = f"the best general score that keeps {least_task:g} of the task"
    return max(fit, key=lambda point: (point.general, point.task, point.factor)), rule


def _kept(point: Point, base: Point, adapter: Point) -> tuple[float, float]:
    return point.task / adapter.task, point.general / base.general


def draw(found: Blend, path: Path) -> None:
    """The curve as a picture; the name's ending says of which kind."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # heavy, and no window is wanted
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    factors = [point.factor for point in found.points]
    axes.plot(factors, [point.task for point in found.points], marker="o", label="task")
    axes.plot(factors, [point.general for point in found.points], marker="s", label="general")
    axes.axvline(found.picked.factor, linestyle="--", color="grey", label=f"picked: {found.picked.factor:g}")
    axes.set_xlabel("factor (0: the base, 1: the adapter)")
    axes.set_ylabel("exact match")
    axes.set_ylim(-0.02, 1.02)
    axes.legend()
    figure.savefig(path, dpi=150)
