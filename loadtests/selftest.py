"""What this machine's load generator can do and how wrong its times are: `python -m loadtests.selftest`.

Prints one JSON object a line for each figure and ends with 1 where a must is missed. Nothing else should run on the
machine: a generator that shares its core reports the neighbour's work as the server's slowness. Where a hypervisor or
another process takes the cores at times, errors are told of the turns in which none did.
"""

import argparse
import asyncio
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from loadtests.figures import Bound, Row, add_files, exit_code, tell, write
from loadtests.overhead.processes import Others, cpu_ns, machine, niceness, on_core, two_cores
from loadtests.overhead.stack import CannotMeasureError, free_port, running
from loadtests.playing import CannotPlay, Keys, Server, play
from loadtests.recording import ABSENT, Lateness, Outcome, Samples
from loadtests.scenario import Scenario
from loadtests.scheduling import schedule_of
from loadtests.stamping import AT_ONCE_CHUNKS

BOUNDS: Final = {
    "streams_per_s_per_core": Bound(3_000, None, "higher", "streamed requests of 32 chunks per second and core"),
    "ttft_error_p99_ms": Bound(3, None, "lower", "TTFT − the server's own, p99 at 100 requests/s, ms"),
    "sent_late_p99_ms": Bound(3, None, "lower", "sent after its time, p99 at 100 requests/s, ms"),
    "frozen_response_p99_ms": Bound(
        2_500, None, "higher", "response time p99 where the server stood still for 3 s, ms"
    ),
    "frozen_service_p99_ms": Bound(100, None, "lower", "service time p99 of the same requests, ms"),
    "failed_requests": Bound(0, None, "lower", "requests that failed"),
}
CALLERS: Final = 64
STEP_US: Final = 10_000
RATE: Final = 100
QUIET: Final = 0.005
"""Of two cores' time, what others may take in a turn that counts as one of a quiet core."""
FEW: Final = 10
"""Connections of the freeze: a pool as an application has it, behind which requests queue while the server stands."""
_STAMPS: Final = re.compile(r"@(\d+) @(\d+) ")


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    rounds: int
    busy_s: float
    quiet_turns: int
    """Turns on quiet cores that are enough."""
    most_turns: int
    paced_s: float
    run_s: float
    frozen_s: float


QUICK: Final = Effort(rounds=1, busy_s=2, quiet_turns=1, most_turns=1, paced_s=5, run_s=15, frozen_s=3)
FULL: Final = Effort(rounds=5, busy_s=4, quiet_turns=3, most_turns=20, paced_s=10, run_s=15, frozen_s=3)
Played = tuple[Samples, list[Lateness]]


@dataclass(frozen=True, slots=True)
class Turn:
    """Requests at a fixed rate, and what share of the cores went to processes without a part, or to another machine."""

    samples: Samples
    others: float


@dataclass(frozen=True, slots=True)
class Bench:
    """A server on one core and a generator on another, or each on any; files in `folder`."""

    folder: Path
    cores: tuple[int, int] | None = None

    @contextmanager
    def server(self, step_us: int) -> Iterator[tuple[Server, "subprocess.Popen[bytes]"]]:
        """A stamping server; `step_us` between its chunks."""
        port = free_port()
        command = [sys.executable, "-m", "loadtests.stamping", str(port), str(step_us)]
        url = f"http://127.0.0.1:{port}"
        log, core = self.folder / "server.log", self.cores[0] if self.cores else None
        with running(command, f"{url}/v1/models", core=core, log=log, env=os.environ) as start:
            yield Server(url, "stamping"), start.process

    async def play(self, told: Scenario, server: Server, on_begin: Any = None) -> Played:
        """With one generator process."""
        with on_core(self.cores[1]) if self.cores else nullcontext():
            return await play(
                schedule_of(told),
                scenario=told,
                server=server,
                keys=Keys(["sk-none"]),
                processes=1,
                folder=self.folder,
                on_begin=on_begin,
            )

    async def busy(self, effort: Effort) -> Played:
        """As many streams as it can read."""
        with self.server(0) as (server, _):
            return await self.play(load({"law": "closed", "callers": CALLERS}, effort.busy_s), server)

    async def paced(self, effort: Effort) -> list[Turn]:
        """At a rate that leaves it time, all stamps kept: until enough turns were quiet, or all were played."""
        turns: list[Turn] = []
        with self.server(STEP_US) as (server, process):
            while len(turns) < effort.most_turns and len(quiet(turns)) < effort.quiet_turns:
                turns.append(await self._turn(effort, server, process.pid, seed=len(turns) + 1))
        return turns

    async def _turn(self, effort: Effort, server: Server, server_pid: int, seed: int) -> Turn:
        told = load({"law": "poisson", "rate": RATE}, effort.paced_s, seed=seed, canary_share=1.0)
        cores = set(self.cores or os.sched_getaffinity(0))
        others = Others(cores, lambda: _ours_ns(server_pid))
        samples, _ = await self.play(told, server)
        return Turn(samples, others.share())

    async def frozen(self, effort: Effort, connections: int | None = FEW) -> Played:
        """While the server stands still for some seconds, asked by a client with a small pool of connections."""
        with self.server(STEP_US) as (server, process):
            freezes: list[asyncio.Task[None]] = []

            def on_begin(begin: int) -> None:
                freezes.append(asyncio.create_task(_freeze(process, effort)))

            law = {"law": "constant", "rate": RATE}
            few = Server(server.url, server.base_model, connections=connections)
            told = await self.play(load(law, effort.run_s, output_tokens={"law": "fixed", "value": 2}), few, on_begin)
            await asyncio.gather(*freezes)
            return told


def quiet(turns: Collection[Turn]) -> list[Turn]:
    """Those in which others took next to nothing."""
    return [turn for turn in turns if turn.others <= QUIET]


def _ours_ns(server_pid: int) -> int:
    """CPU time so far of the server, of this process and of its children that have ended: the generators."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return cpu_ns([server_pid]) + int(sum(one.ru_utime + one.ru_stime for one in used) * 1e9)


async def _freeze(process: "subprocess.Popen[bytes]", effort: Effort) -> None:
    await asyncio.sleep(effort.run_s / 3)
    process.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(effort.frozen_s)
    finally:
        process.send_signal(signal.SIGCONT)


def load(arrivals: dict[str, Any], duration_s: float, seed: int = 1, **workload: Any) -> Scenario:
    """One tenant's load, as a scenario."""
    plain = {"output_tokens": {"law": "fixed", "value": AT_ONCE_CHUNKS}, "canary_share": 0.0}
    return Scenario.model_validate(
        {
            "name": "selftest",
            "question": "what can this machine's load generator do?",
            "seed": seed,
            "tenants": [{"name": "caller"}],
            "workloads": {"chat": plain | workload},
            "phases": [
                {
                    "name": "only",
                    "duration_s": duration_s,
                    "load": [{"tenants": "caller", "workload": "chat", "arrivals": arrivals}],
                }
            ],
            "gates": [{"metric": "error_share", "at_most": 0}],
        }
    )


# figures


def row(figure: str, value: float, **detail: object) -> Row:
    """The verdict on a value."""
    return Row(figure, value, BOUNDS[figure], detail)


def rate_of(samples: Samples) -> float:
    """Requests per second, from the first that was sent to the last that was whole."""
    rows = samples.rows[samples.rows["outcome"] == Outcome.WHOLE]
    return float(len(rows) / max(1, rows["done"].max() - rows["sent"].min()) * 1e9) if len(rows) else 0.0


def ttft_errors_ms(samples: Samples) -> list[float]:
    """Of each whole answer: what was written down, less what the server's stamps say."""
    errors = []
    for one in samples.rows[samples.rows["answer"] != ABSENT]:
        found = _STAMPS.match(samples.texts[one["answer"]])
        if found is not None:
            came, sent = int(found[1]), int(found[2])
            errors.append(float(one["first"] - one["sent"] - (sent - came)) / 1e6)
    return errors


def late_ms(samples: Samples) -> Any:
    """How far after its time each request was sent."""
    return (samples.rows["sent"] - samples.rows["scheduled"]) / 1e6


def failed(samples: Samples) -> int:
    """Requests that were sent and are not whole."""
    return int((~np.isin(samples.rows["outcome"], (Outcome.WHOLE, Outcome.UNSENT))).sum())


def p99_ms(since: Any, until: Any) -> float:
    """Of the time between two columns of ns."""
    return _p99((until - since) / 1e6)


def measure(effort: Effort, folder: Path) -> Iterator[Row]:
    """The figures, each as soon as it is known.

    Raises:
        CannotMeasureError: a server does not start.
        CannotPlay: a generator fails.
    """
    bench = Bench(folder, two_cores())
    rounds = [asyncio.run(bench.busy(effort)) for _ in range(effort.rounds)]
    rates = [rate_of(samples) for samples, _ in rounds]
    shares = [round(lateness[0].cpu_share, 2) for _, lateness in rounds]
    yield row(
        "streams_per_s_per_core", statistics.median(rates), each=[round(rate) for rate in rates], cpu_share=shares
    )
    turns = asyncio.run(bench.paced(effort))
    yield from paced_rows(turns)
    frozen, _ = asyncio.run(bench.frozen(effort))
    rows = frozen.rows
    yield row("frozen_response_p99_ms", p99_ms(rows["scheduled"], rows["done"]), connections=FEW)
    yield row("frozen_service_p99_ms", p99_ms(rows["sent"], rows["done"]), samples=len(rows))
    played = (*(samples for samples, _ in rounds), *(turn.samples for turn in turns), frozen)
    yield row("failed_requests", sum(failed(one) for one in played))


def paced_rows(turns: Sequence[Turn]) -> Iterator[Row]:
    """Errors of the quiet turns; of all, where none was quiet: whoever measures on such a machine should know."""
    calm, each = quiet(turns), {id(turn): ttft_errors_ms(turn.samples) for turn in turns}
    counted = calm or turns
    errors = [error for turn in counted for error in each[id(turn)]]
    late = np.concatenate([late_ms(turn.samples) for turn in counted])
    told = {
        "quiet_turns": len(calm),
        "others_share": [round(turn.others, 4) for turn in turns],
        "each_p99_ms": [round(_p99(found), 2) for found in each.values()],
    }
    yield row("ttft_error_p99_ms", _p99(errors), **_spread(errors), samples=len(errors), **told)
    yield row("sent_late_p99_ms", _p99(late), **_spread(late))


def _p99(values: Any) -> float:
    return float(np.quantile(values, 0.99))


def _spread(values: Any) -> dict[str, float]:
    return {"p50_ms": round(float(np.median(values)), 3), "most_ms": round(float(np.max(values)), 3)}


def run(args: argparse.Namespace) -> int:
    """Measure, tell and write."""
    rows: list[Row] = []
    try:
        with (
            tempfile.TemporaryDirectory(prefix="tailor-selftest-") as folder,
            niceness(args.nice) if args.nice else nullcontext(),
        ):
            for one in measure(QUICK if args.quick else FULL, Path(folder)):
                tell([one])
                rows.append(one)
    except (CannotMeasureError, CannotPlay) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    write(rows, args, {"machine": machine()})
    return exit_code(rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.selftest", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="half a minute: for a look, not for a record")
    parser.add_argument("--nice", type=int, default=0, help="niceness of all that is measured; below 0 asks for root")
    add_files(parser)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends with us
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
