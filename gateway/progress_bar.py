"""A progress bar on standard error for the long steps of the command."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class StepDone(Protocol):
    """`training.progress.Progress`, without importing it."""

    @property
    def step(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def loss(self) -> float: ...


@contextmanager
def progress_bar(title: str = "training") -> Iterator[Callable[[StepDone], None]]:
    """Yields what a training run calls after each step."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=None, loss=float("nan"))

        def on_progress(done: StepDone) -> None:
            progress.update(task, completed=done.step, total=done.total, loss=done.loss)

        yield on_progress
