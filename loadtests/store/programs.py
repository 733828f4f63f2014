"""Programs that live with the tests, since they import what they measure: run here, heard by the lines they print."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from loadtests.overhead.stack import CannotMeasureError

ROOT: Final = Path(__file__).parents[2]


def run(
    program: str, *arguments: str, codes: Sequence[int] = (0,), settings: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """The JSON objects that it prints until it ends.

    Raises:
        CannotMeasureError: it ends with another code.
    """
    command = [sys.executable, "-m", program, *arguments]
    env = {**os.environ, **(settings or {})}
    done = subprocess.run(command, cwd=ROOT, env=env, check=False, capture_output=True, text=True)
    if done.returncode not in codes:
        raise CannotMeasureError(f"{program} broke off:\n{done.stderr[-2_000:]}")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


class Program:
    """One that answers a line with a line."""

    def __init__(self, name: str, process: "subprocess.Popen[str]") -> None:
        self._name = name
        self._process = process

    def ask(self, line: str) -> dict[str, Any]:
        """What it says to that.

        Raises:
            CannotMeasureError: it has ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise CannotMeasureError(f"{self._name} broke off; its error stands above") from None
        return self.hear()

    def hear(self) -> dict[str, Any]:
        """The next line that it prints.

        Raises:
            CannotMeasureError: it has ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise CannotMeasureError(f"{self._name} broke off; its error stands above")
        said: dict[str, Any] = json.loads(line)
        return said


@contextmanager
def running(program: str, *arguments: str) -> Iterator[Program]:
    """The program, until the block ends; it goes when its stdin is closed."""
    command = [sys.executable, "-m", program, *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Program(program, process)
