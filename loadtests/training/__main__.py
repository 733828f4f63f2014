"""`python -m loadtests.training`: what a step of training costs beside TRL's, and what a batch of tenants gains.

Prints one JSON object a line for each figure and ends with 1 where a must is missed, with 2 where one could not be
measured. CPU time of processes on one thread each: other work on the machine makes it dearer, so what is compared runs
in turns and the least counts.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from typing import Any, Final

from loadtests.figures import Bound, Row, add_files, exit_code, tell, write
from loadtests.overhead.processes import machine
from loadtests.overhead.stack import CannotMeasureError
from loadtests.store.programs import run

PROGRAM: Final = "tests.bench.training"
BATCHES: Final = (1, 4)
TURNS: Final = 3
BOUNDS: Final = {
    "step_over_trl_b1": Bound(1.0, None, "lower", "CPU of a step ÷ TRL's SFTTrainer's, batch 1"),
    "step_over_trl_b4": Bound(1.0, None, "lower", "CPU of a step ÷ TRL's SFTTrainer's, batch 4"),
    "gain_b1": Bound(4.0, None, "higher", "eight tenants one after the other ÷ at once, CPU, batch 1 each"),
    "gain_b4": Bound(2.0, None, "higher", "eight tenants one after the other ÷ at once, CPU, batch 4 each"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtests.training", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one turn each: for a look, not for a record")
    add_files(parser)
    args = parser.parse_args()
    rows: list[Row] = []
    try:
        with tempfile.TemporaryDirectory() as folder:
            for one in measure(f"{folder}/base", 1 if args.quick else TURNS):
                tell([one])
                rows.append(one)
    except CannotMeasureError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    write(rows, args, {"machine": machine()})
    return exit_code(rows)


def measure(base: str, turns: int) -> Iterator[Row]:
    """The figures, as they come.

    Raises:
        CannotMeasureError: a program breaks off.
    """
    run(PROGRAM, "base", base)
    for batch in BATCHES:
        found: dict[str, list[dict[str, Any]]] = {"engine": [], "trl": [], "gain": []}
        for _ in range(turns):
            for what, each in found.items():
                each.append(run(PROGRAM, what, base, str(batch))[-1])
        ours, theirs = (min(one["ms_per_step"] for one in found[what]) for what in ("engine", "trl"))
        yield row(f"step_over_trl_b{batch}", ours / theirs, ms=round(ours, 2), trl_ms=round(theirs, 2))
        one_by_one, at_once = (min(one[what] for one in found["gain"]) for what in ("one_by_one_ms", "at_once_ms"))
        growth = max(one["growth_mib"] for one in found["gain"])
        times = {"one_by_one_ms": round(one_by_one, 2), "at_once_ms": round(at_once, 2)}
        yield row(f"gain_b{batch}", one_by_one / at_once, **times, tenants=8, memory_growth_mib=growth)


def row(figure: str, value: float, **detail: object) -> Row:
    return Row(figure, value, BOUNDS[figure], detail)


if __name__ == "__main__":
    sys.exit(main())
