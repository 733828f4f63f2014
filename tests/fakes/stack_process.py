"""`tailor up` with fake replicas for engines, each a process: `python -m tests.fakes.stack_process FINGERPRINT`."""

import asyncio
import os
import sys
from collections.abc import Mapping, Sequence

from gateway.settings import Settings
from gateway.stack import run_up


def launch(_: int, listen: str) -> tuple[Sequence[str], Mapping[str, str]]:
    command = [sys.executable, "-m", "tests.fakes.replica_process", listen.removeprefix("unix:"), sys.argv[1]]
    return command, os.environ


if __name__ == "__main__":
    asyncio.run(run_up(Settings(), lambda text: print(text, flush=True), launch))  # noqa: T201  as the command does
