"""Processes of a stack, which end with it."""

import asyncio
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

WITH_PARENT: Final = (sys.executable, "-m", "loadtests.with_parent")
"""Before a command that would go on where this process is killed."""
STOP_S: Final = 60.0
LOOK_S: Final = 0.05


class StackFailed(Exception):
    """A stack that does not start or cannot be disturbed; its processes' last words are in the text."""


@dataclass(slots=True)
class Child:
    """A process of a stack, which ends with it; what it says is in its log."""

    command: Sequence[str]
    env: Mapping[str, str]
    log: Path
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command,
                env=self.env,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C at the terminal is ours alone
            )

    def kill(self) -> None:
        """At once; the kernel closes what it had open."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def kill_all(self) -> None:
        """It and all that it has started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    async def ended(self) -> int:
        """Its exit code, once it has one."""
        assert self.process is not None
        await self._ends(math.inf)
        return self.process.wait()

    async def stop(self) -> None:
        """It finishes what runs."""
        if self.process is None or self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGCONT)
        self.process.terminate()
        if not await self._ends(STOP_S):
            self.kill()

    async def _ends(self, within_s: float) -> bool:
        stop = time.monotonic() + within_s
        while self.process is not None and self.process.poll() is None:
            if time.monotonic() > stop:
                return False
            await asyncio.sleep(LOOK_S)
        return True

    def send(self, number: signal.Signals) -> None:
        """A signal to a process that runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-2_000:] if self.log.exists() else ""
