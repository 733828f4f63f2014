"""What a running load test looks like in a terminal: where it is, and how each group of tenants fares.

Response times, not service times: a server that stops is seen to stop.
"""

import math
import sys
from types import TracebackType
from typing import Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from loadtests.progress import Progress, Tally
from loadtests.scenario import Scenario
from loadtests.scheduling import phase_times
from loadtests.selection import S

LINE_S: Final = 10.0
"""Between lines where the output is no terminal."""
_COLUMNS: Final = (
    *("tenants", "sent", "in flight", "answers/s", "tokens/s", "failed", "refused"),
    *("TTFT p50", "TTFT p99", "between tokens p99"),
)


class Display:
    """Give it to a run as `on_progress`; a context manager, so that the terminal is itself again afterwards."""

    def __init__(self, scenario: Scenario, console: Console | None = None) -> None:
        self._scenario = scenario
        self._phases = phase_times(scenario)
        self._end = self._phases[-1][1]
        self._console = console or Console(file=sys.stderr)
        self._live = Live(console=self._console, refresh_per_second=4)
        self._before = Progress(0, {})
        self._told_at = -math.inf

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def __call__(self, progress: Progress) -> None:
        if self._console.is_terminal:
            self._live.update(self.seen(progress))
        elif progress.at / S - self._told_at >= LINE_S:
            self._told_at = progress.at / S
            self._console.print(self.line(progress), highlight=False, soft_wrap=True)
        self._before = progress

    def seen(self, progress: Progress) -> RenderableType:
        """The whole picture."""
        done = min(1.0, max(0.0, progress.at / self._end))
        head = Text.assemble(
            (self._scenario.name, "bold"), f"  {self._where(progress.at)}", ("  " + self._left(progress.at), "dim")
        )
        table = Table(*_COLUMNS, box=None, pad_edge=False, header_style="dim")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, tally in sorted(progress.groups.items()):
            table.add_row(name, *self._row(tally, self._before.groups.get(name, Tally()), self._since(progress)))
        if len(progress.groups) > 1:
            table.add_row("all", *self._row(_all(progress), _all(self._before), self._since(progress)), style="bold")
        bar = Padding(ProgressBar(total=1.0, completed=done, width=60), 0)  # which ends its line
        return Group(head, bar, table)

    def line(self, progress: Progress) -> str:
        """As one line, for a log."""
        tally = _all(progress)
        return (
            f"{progress.at / S:.0f} s {self._where(progress.at)}: {tally.sent} sent, {tally.in_flight} in flight, "
            f"{tally.failed} failed, {tally.refused} refused, TTFT p99 {_ms(tally.ttft_us.quantile(0.99))}"
        )

    def _since(self, progress: Progress) -> float:
        return max(1e-3, (progress.at - self._before.at) / S)

    def _where(self, at: int) -> str:
        for phase, (begin, end) in zip(self._scenario.phases, self._phases, strict=True):
            if begin <= at < end:
                return f"phase {phase.name}" + ("" if phase.measured else " (warm-up)")
        return "before its begin" if at < 0 else "settling" if at < self._end else "waiting for the last answers"

    def _left(self, at: int) -> str:
        left = max(0, self._end - max(at, 0)) / S
        return f"{left // 60:.0f}:{left % 60:02.0f} left"

    @staticmethod
    def _row(now: Tally, before: Tally, seconds: float) -> tuple[Text | str, ...]:
        return (
            f"{now.sent:,}",
            f"{now.in_flight:,}",
            f"{(now.done - before.done) / seconds:,.1f}",
            f"{(now.tokens - before.tokens) / seconds:,.0f}",
            _alarming(now.failed, "red"),
            _alarming(now.refused, "yellow"),
            _ms(now.ttft_us.quantile(0.5)),
            _ms(now.ttft_us.quantile(0.99)),
            _ms(now.itl_us.quantile(0.99)),
        )


def _all(progress: Progress) -> Tally:
    total = Tally()
    for tally in progress.groups.values():
        total.add(tally)
    return total


def _alarming(count: int, style: str) -> Text:
    return Text(f"{count:,}", style=style if count else "")


def _ms(us: float) -> str:
    if math.isnan(us):
        return "–"
    return f"{us / 1e3:,.0f} ms" if us >= 100_000 else f"{us / 1e3:.3g} ms"
