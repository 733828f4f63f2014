"""The tool as a process of its own, and whatever it starts, to be interrupted and killed."""

import os
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")


@dataclass(frozen=True)
class Tool:
    """`tailor loadtest` that runs; all that it says is in its standard output."""

    process: "subprocess.Popen[str]"
    mark: str

    def says(self, text: str) -> bool:
        """Wait until it has."""
        assert self.process.stdout is not None
        return any(text in line for line in self.process.stdout)

    def last_words(self) -> str:
        """Once it has ended."""
        said, _ = self.process.communicate(timeout=90)
        return said

    def left(self, within_s: float = 10.0) -> list[str]:
        """Which of the processes that it started are still there, after that time at most."""
        stop = time.monotonic() + within_s
        while (found := self.alive()) and time.monotonic() < stop:
            time.sleep(0.05)
        return found

    def ports(self) -> set[int]:
        """On which its stack is told to listen."""
        found = set()
        for one in PROC.iterdir():
            with suppress(OSError):
                told = (one / "environ").read_bytes() if one.name.isdigit() else b""
                if self.mark.encode() in told:
                    found |= {int(port) for port in re.findall(rb"\0TAILOR_(?:OPERATOR_)?PORT=(\d+)", told)}
        return found

    def alive(self) -> list[str]:
        """Which of the processes that it started there are, and it itself."""
        found = []
        for one in PROC.iterdir():
            try:
                if one.name.isdigit() and self.mark.encode() in (one / "environ").read_bytes():
                    found.append((one / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:  # it has ended, or is another user's
                continue
        return found


@contextmanager
def tool(*words: object, **env: str) -> Iterator[Tool]:
    """Running until the block ends."""
    mark = uuid.uuid4().hex
    command = [sys.executable, "-m", "gateway.cli", "loadtest", *map(str, words)]
    with subprocess.Popen(
        command,
        env={**os.environ, **env, "LOADTEST_MARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield Tool(process, mark)
        finally:
            process.kill()
