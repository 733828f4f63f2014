"""Child processes of `tailor up`: each in a process group of its own, restarted when it dies, gone when we go."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("tailor.supervisor")
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0  # a child that lived this long starts again at once


@dataclass(frozen=True, slots=True)
class Command:
    """What to run, and where its output goes."""

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    prepare: Callable[[], None] | None = None


class Child:
    """One supervised process group."""

    def __init__(self, command: Command, *, stop_s: float) -> None:
        self.command = command
        self._stop_s = stop_s
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def run(self) -> None:
        """Keep the child alive until `stop`; restarts wait longer and longer while it dies young."""
        pause_s = FIRST_PAUSE_S
        while not self._stopping.is_set():
            begin = time.monotonic()
            try:
                status: object = await self._run_once()
            except OSError as error:  # no log file, no descriptor, no memory: it may pass
                status = error
            if self._stopping.is_set():
                return
            lived_s = time.monotonic() - begin
            if lived_s > STEADY_S:
                pause_s = FIRST_PAUSE_S
            self.restarts += 1
            log.error(
                "%s ended with status %s after %.0f s; started again in %.1f s; its output: %s",
                self.command.name, status, lived_s, pause_s, self.command.log,
            )  # fmt: skip
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def _run_once(self) -> int:
        command = self.command
        if command.prepare is not None:
            command.prepare()
        with command.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                *command.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=dict(command.environment),
                start_new_session=True,
            )
        try:
            return await self._process.wait()
        finally:
            self._kill_group()  # whatever the child left behind in its group

    def _kill_group(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def stop(self) -> None:
        """SIGTERM, time to drain, then SIGKILL for the whole group."""
        self._stopping.set()
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            async with asyncio.timeout(self._stop_s):
                await process.wait()
        except TimeoutError:
            log.warning("%s did not stop within %.0f s: killed", self.command.name, self._stop_s)
        self._kill_group()
        await process.wait()

    def kill(self) -> None:
        """At once, without draining."""
        self._stopping.set()
        self._kill_group()
