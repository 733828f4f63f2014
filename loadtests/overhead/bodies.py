"""Event-loop time of a body of 1 MB, the dearest of the ordinary shapes.

The program lives with the tests, since it imports what it measures; the least of its many runs of each shape counts.
"""

import json
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from loadtests.figures import Row
from loadtests.overhead.processes import on_core, two_cores
from loadtests.overhead.report import row
from loadtests.overhead.stack import CannotMeasureError

PROGRAM: Final = "tests.bench.dialects"
ROOT: Final = Path(__file__).parents[2]


def body_row() -> Row:
    """Three seconds of one core.

    Raises:
        CannotMeasureError: the program broke off.
    """
    with on_core(two_cores()[0]):
        run = subprocess.run(
            [sys.executable, "-m", PROGRAM, "--ordinary"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
        )
    if run.returncode not in (0, 1):  # 1: a body is too dear, which the row says
        raise CannotMeasureError(f"{PROGRAM} broke off; its error stands above")
    return worst(run.stdout.splitlines())


def worst(lines: Iterable[str]) -> Row:
    """The row of what the program told.

    Raises:
        CannotMeasureError: it told nothing, or of an ordinary body that was refused.
    """
    told = [json.loads(line) for line in lines]
    refused = [line["figure"] for line in told if line["told"] != "sent"]
    if refused or not told:
        raise CannotMeasureError(f"{PROGRAM} measured no body, or one that was refused: {refused}")
    each = {line["figure"].removeprefix("policy: "): line["value_ms"] for line in told}
    return row("body_1mb_cpu_ms", max(each.values()), each_ms=each)
