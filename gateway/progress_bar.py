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
    progress = Progress(*columns, console=Console(stderr=True))
    task = progress.add_task(title, total=None, loss=0.0)

    def on_progress(done: StepDone) -> None:
        progress.start()  # shown only once there is something to show; starting again is nothing
        progress.update(task, completed=done.step, total=done.total, loss=done.loss)

    try:
        yield on_progress
    finally:
        if progress.live.is_started:
            progress.stop()
