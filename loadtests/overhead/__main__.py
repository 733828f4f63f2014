"""`python -m loadtests.overhead`: the gateway beside nginx and the upstream itself, in one interleaved run.

Prints one JSON object a line for each figure and ends with 1 where a must is missed. Nothing else should run on the
machine; where it does, trust CPU per operation more than rates.
"""

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import uvloop

from loadtests.figures import Row, add_files, exit_code, tell, write
from loadtests.overhead.bodies import body_row
from loadtests.overhead.client import Target
from loadtests.overhead.features import missing_features
from loadtests.overhead.model_files import BASE_NAME
from loadtests.overhead.phases import Length, Round, Watched, all_phases, median, watch
from loadtests.overhead.processes import machine, niceness, on_core, rss_mib, two_cores
from loadtests.overhead.profile import profile
from loadtests.overhead.report import load_rows, row
from loadtests.overhead.scale import scale_rows
from loadtests.overhead.stack import (
    CannotMeasureError,
    Gateway,
    RunningGateway,
    Start,
    base_model,
    mock_upstream,
    nginx,
    nginx_path,
)


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    rounds: int
    seconds: float
    first_tokens: int
    starts: int
    scale_rounds: int


QUICK = Effort(rounds=2, seconds=1.0, first_tokens=100, starts=3, scale_rounds=5)
FULL = Effort(rounds=9, seconds=2.0, first_tokens=300, starts=5, scale_rounds=20)


def main() -> int:
    args = _arguments()
    effort = QUICK if args.quick else FULL
    effort = replace(effort, rounds=args.rounds or effort.rounds, seconds=args.seconds or effort.seconds)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends with us
    try:
        rows, rounds = measure(args, effort)
        tell(rows)
        if not args.skip_scale:
            scale = scale_rows(rounds=effort.scale_rounds)
            tell(scale)
            rows += scale
    except CannotMeasureError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    write(rows, args, _about(rounds))
    return exit_code(rows)


@dataclass(frozen=True, slots=True)
class Stack:
    """What is measured, running: direct, nginx and gateway, in this order; `starts` are the gateway's."""

    upstream_port: int
    gateway: RunningGateway
    starts: Sequence[Start]
    ready_mib: float
    targets: Sequence[Target]


def measure(args: argparse.Namespace, effort: Effort) -> tuple[list[Row], list[Round]]:
    """The figures of one run, and the rounds they are the medians of.

    Raises:
        CannotMeasureError: something is missing or does not start.
    """
    nginx_path()
    proxy_core, client_core = two_cores()
    with ExitStack() as held:
        if args.nice:
            held.enter_context(niceness(args.nice))
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="tailor-overhead-")))
        stack = start(held, folder, (proxy_core, client_core), dict(args.set), effort.starts)
        with on_core(client_core):
            if args.profile is not None:
                profile(stack.targets[-1], stack.gateway.start.process.pid, args.profile)
            rounds = run(effort, watch(stack.targets, {proxy_core, client_core}))
        loaded_mib = rss_mib(stack.gateway.start.process.pid)
        missing = missing_features(stack.gateway, stack.targets[-1], stack.upstream_port)
    memory = {"at_readiness_mib": round(stack.ready_mib, 1), "after_load_mib": round(loaded_mib, 1)}
    rows = [
        *load_rows(median(rounds)),
        row("memory_per_worker_mib", max(stack.ready_mib, loaded_mib), **memory),
        start_row(stack.starts),
        body_row(),
        row("features_off", len(missing), missing=missing),
    ]
    return rows, rounds


def start(held: ExitStack, folder: Path, cores: tuple[int, int], settings: Mapping[str, str], times: int) -> Stack:
    """Start everything; the gateway several times, the first on an empty home. `cores`: the proxies', the client's."""
    proxy_core, client_core = cores
    base, fingerprint = base_model(folder / BASE_NAME)
    upstream = held.enter_context(mock_upstream(folder, fingerprint, client_core))
    gateway = Gateway(folder, base, upstream, proxy_core, settings)
    starts = []
    for _ in range(times - 1):
        with gateway.started() as once:
            starts.append(once.start)
    running = held.enter_context(gateway.started())
    ready_mib = rss_mib(running.start.process.pid)
    through_nginx = held.enter_context(nginx(folder / "nginx", upstream, proxy_core))
    targets = [Target("direct", upstream), through_nginx, running.target()]
    return Stack(upstream, running, [*starts, running.start], ready_mib, targets)


def run(effort: Effort, watched: Sequence[Watched]) -> list[Round]:
    """All rounds."""
    length = Length(effort.seconds, effort.first_tokens)
    return [uvloop.run(all_phases(watched, length)) for _ in range(effort.rounds)]


def start_row(starts: Sequence[Start]) -> Row:
    """The median of all; the first is on an empty home."""
    each = {
        "each_s": [round(start.took_s, 2) for start in starts],
        "cpu_s": [round(start.cpu_s, 2) for start in starts],
    }
    return row("start_to_ready_s", statistics.median(start.took_s for start in starts), **each)


def _about(rounds: list[Round]) -> dict[str, object]:
    return {
        "machine": {**machine(), "nginx": nginx_version()},
        "rounds": [
            {phase: {name: asdict(sample) for name, sample in by.items()} for phase, by in one.items()}
            for one in rounds
        ],
    }


def nginx_version() -> str:
    """Of the yardstick."""
    told = subprocess.run([nginx_path(), "-v"], capture_output=True, text=True, check=True).stderr.strip()
    return told.rpartition("/")[2]


def _setting(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    return name, value


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.overhead", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less than a minute: for a look, not for a record")
    parser.add_argument("--rounds", type=int, help="how often each target is visited")
    parser.add_argument("--seconds", type=float, help="length of each timed phase")
    parser.add_argument("--skip-scale", action="store_true", help="leave out the 100,000 adapters")
    add_files(parser)
    parser.add_argument("--profile", type=Path, help="first sample the gateway with py-spy into this folder")
    parser.add_argument("--nice", type=int, default=0, help="niceness of all that is measured; below 0 asks for root")
    parser.add_argument("--set", type=_setting, action="append", default=[], help="NAME=VALUE for the gateway")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
