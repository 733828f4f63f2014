"""Where the gateway's time goes under a load: samples by py-spy, which is not among the project's dependencies."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import uvloop

from loadtests.overhead.client import Target
from loadtests.overhead.phases import SLOW_STEP_US, closed_loop, streams
from loadtests.overhead.stack import CannotMeasureError

SECONDS: Final = 8
RATE_HZ: Final = 400


def py_spy() -> str:
    """Where it is.

    Raises:
        CannotMeasureError: nowhere.
    """
    found = shutil.which("py-spy", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if found is None:
        raise CannotMeasureError("py-spy is not installed: .venv/bin/pip install py-spy, or put it on PATH.")
    return found


def profile(target: Target, pid: int, folder: Path) -> None:
    """Stacks and how often each was seen: `requests.txt` for a closed loop, `streams.txt` for 64 streams × 20 ms.

    Raises:
        CannotMeasureError: py-spy is missing or may not look into the process.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _sampling(pid, folder / "requests.txt"):
        uvloop.run(closed_loop(target, SECONDS + 2))
    with _sampling(pid, folder / "streams.txt"):
        uvloop.run(streams(target, SLOW_STEP_US, SECONDS + 2))


@contextmanager
def _sampling(pid: int, out: Path) -> Iterator[None]:
    command = [py_spy(), "record", "--nonblocking", "--format", "raw", "--output", str(out)]
    command += ["--rate", str(RATE_HZ), "--duration", str(SECONDS), "--pid", str(pid)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as recording:
        yield
        _, told = recording.communicate()
    if recording.returncode != 0:
        raise CannotMeasureError(f"py-spy: {told}")
