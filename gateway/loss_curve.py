"""A job's losses as a curve in the terminal, redrawn as they come; plain lines where standard error is no terminal."""

import sys
from types import TracebackType
from typing import Any, Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

WIDTH: Final = 72
HEIGHT: Final = 12
DOTS: Final = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Braille's dots, by column and row: each character is two points wide and four high."""
MOST_LINES: Final = 4


class LossCurve:
    """Given the job and its new events again and again."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=4) if self._console.is_terminal else None
        self._training: list[tuple[int, float]] = []
        self._validation: list[tuple[int, float]] = []
        self._said: list[str] = []

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, job: dict[str, Any], events: list[dict[str, Any]]) -> None:
        """Draws what is there by now."""
        for event in events:
            self._take(event)
        if self._live is not None:
            self._live.update(self._picture(job))

    def _take(self, event: dict[str, Any]) -> None:
        data = event["data"]
        if event["type"] == "metrics":
            self._training.append((data["step"], data["train_loss"]))
            if "valid_loss" in data:
                self._validation.append((data["step"], data["valid_loss"]))
        else:
            self._said.append(event["message"])
        if self._live is None:
            print(event["message"], file=sys.stderr)  # noqa: T201  what there is to see without a terminal

    def _picture(self, job: dict[str, Any]) -> RenderableType:
        at = job["tailor"]
        head = f"{job['id']}  {job['status']}  step {at['step']}/{at['total_steps'] or '?'}"
        if self._training:
            head += f"  loss {self._training[-1][1]:.4f}"
        if self._validation:
            head += f"  validation {self._validation[-1][1]:.4f}"
        return Group(
            Text(head, style="bold"),
            Text("\n".join(curve(self._training, self._validation)), style="cyan"),
            Text("\n".join(self._said[-MOST_LINES:]), style="dim"),
        )


def curve(*lines: list[tuple[int, float]], width: int = WIDTH, height: int = HEIGHT) -> list[str]:
    """Lines of (step, loss) in one picture, its highest and lowest loss beside it; nothing for no points."""
    points = [point for line in lines for point in line]
    if not points:
        return []
    first, last = min(step for step, _ in points), max(step for step, _ in points)
    low, high = min(loss for _, loss in points), max(loss for _, loss in points)
    cells = [[0] * width for _ in range(height)]
    for step, loss in points:
        x = round((step - first) / max(1, last - first) * (2 * width - 1))
        y = round((high - loss) / ((high - low) or 1) * (4 * height - 1))
        cells[y // 4][x // 2] |= DOTS[x % 2][y % 4]
    rows = ["".join(chr(0x2800 + cell) for cell in row) for row in cells]
    labels = [f"{high:9.4f} ", *[" " * 10] * (height - 2), f"{low:9.4f} "]
    return [label + row for label, row in zip(labels, rows, strict=True)]
