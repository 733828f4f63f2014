"""What a running load test tells on a terminal, and in a log."""

import io

import pytest
from rich.console import Console

from loadtests.live import Display
from loadtests.progress import Progress, Tally
from loadtests.scenario import Scenario
from tests.unit.loadtests.runs import MS, S, Shape, run_of

SCENARIO = Scenario.model_validate(run_of(Shape(phases=("calm", "flood"), groups={"loud": 1, "quiet": 1})).scenario)


def _tally(sent: int, done: int, failed: int = 0) -> Tally:
    tally = Tally(sent=sent, done=done, failed=failed, tokens=10 * done)
    tally.ttft_us.add([50_000] * done)
    return tally


def _told(*, terminal: bool) -> str:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=140, color_system=None)
    with Display(SCENARIO, console) as display:
        display(Progress(2 * S, {"loud": _tally(40, 40), "quiet": _tally(40, 40)}))
        display(Progress(4 * S, {"loud": _tally(80, 80), "quiet": _tally(80, 60, 3)}))
        display(Progress(12 * S + 500 * MS, {"loud": _tally(250, 240), "quiet": _tally(250, 145, 7)}))
    return written.getvalue()


def test_a_terminal_shows_each_group_and_where_the_run_is() -> None:
    """Rates are of the time since the last word, all else since the begin."""
    last = _told(terminal=True).split("made-up")[-1]
    assert "phase flood" in last
    assert "0:08 left" in last
    assert any(line.startswith("tenants ") and "tokens p99" in line for line in last.splitlines()), last
    row = next(line for line in last.splitlines() if line.startswith("quiet"))
    assert row.split()[1:7] == ["250", "105", "10.0", "100", "7", "0"]
    assert row.split()[7:] == ["50", "ms", "50", "ms", "–"]
    assert next(line for line in last.splitlines() if line.startswith("all")).split()[1:3] == ["500", "115"]


def test_a_log_gets_a_line_now_and_then() -> None:
    """Not one for every half second, and no control characters."""
    lines = _told(terminal=False).splitlines()
    assert [line.split(":")[0] for line in lines] == ["2 s phase calm", "12 s phase flood"]
    assert "7 failed" in lines[1]


@pytest.mark.parametrize(("at_s", "where"), [(-1, "before its begin"), (25, "waiting for the last answers")])
def test_it_says_when_nothing_is_sent(at_s: int, where: str) -> None:
    """Before the first phase and after the last."""
    display = Display(SCENARIO, Console(file=io.StringIO()))
    assert where in display.line(Progress(at_s * S, {}))
