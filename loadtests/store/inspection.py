"""What inspecting an adapter costs, whatever dtype it is stored in and served in."""

from typing import Final

from loadtests.figures import Row
from loadtests.store import programs
from loadtests.store.report import row

PROGRAM: Final = "tests.bench.inspection"
MISSED: Final = 1
"""What the program ends with where a bound of its own is missed."""


def inspection_row() -> Row:
    """The dearest pair of dtypes.

    Raises:
        CannotMeasureError: the program breaks off.
    """
    costs = programs.run(PROGRAM, codes=(0, MISSED))
    each = {f"{one['stored']}_as_{one['served']}": one["cpu_s"] for one in costs}
    return row("inspection_cpu_s", max(each.values()), megabytes=costs[0]["MB"], each=each)
