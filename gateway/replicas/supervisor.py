"""Child processes: each in a process group of its own, started again when it dies, gone when we go."""

import asyncio
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

log = logging.getLogger("tailor.supervisor")
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
STEADY_S = 60.0  # a child that lived this long starts again at once
READY = b"ready\n"  # written at once, and so read at once


@dataclass(frozen=True, slots=True)
class Command:
    """What to run, and where its output goes (None: where ours does).

    `descriptors` are inherited under their numbers. One that `tells_when_ready` writes the line `READY` on standard
    output, and nothing else that is kept.
    """

    name: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    log: Path | None
    prepare: Callable[[], None] | None = None
    descriptors: Sequence[int] = ()
    tells_when_ready: bool = False


class Child:
    """One supervised process group."""

    def __init__(self, command: Command, *, stop_s: float) -> None:
        self.command = command
        self._stop_s = stop_s
        self._process: asyncio.subprocess.Process | None = None
        self._stopping = asyncio.Event()
        self._restarting = False
        self._is_ready = False
        self._news = asyncio.Event()
        self.restarts = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def becomes_ready(self, tries: int) -> bool:
        """Whether the child, which `tells_when_ready`, became ready before it ended for the `tries`-th time."""
        while not self._is_ready and self.restarts < tries and not self._stopping.is_set():
            await self._news.wait()
            self._news.clear()
        return self._is_ready

    async def run(self) -> None:
        """Keep the child alive until `stop`; restarts wait longer and longer while it dies young."""
        pause_s = FIRST_PAUSE_S
        while not self._stopping.is_set():
            begin = time.monotonic()
            try:
                status: object = await self._run_once()
            except OSError as error:  # no log file, no descriptor, no memory: it may pass
                status = error
            self._is_ready = False
            if self._stopping.is_set():
                self._news.set()
                return
            if self._restarting:
                self._restarting = False
                pause_s = FIRST_PAUSE_S
                continue
            lived_s = time.monotonic() - begin
            if lived_s > STEADY_S:
                pause_s = FIRST_PAUSE_S
            self.restarts += 1
            self._news.set()
            log.error(
                "%s ended with status %s after %.0f s; started again in %.1f s%s",
                self.command.name, status, lived_s, pause_s,
                f"; its output: {self.command.log}" if self.command.log is not None else "",
            )  # fmt: skip
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._stopping.wait()
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    async def _run_once(self) -> int:
        command = self.command
        if command.prepare is not None:
            command.prepare()
        with ExitStack() as held:
            output = held.enter_context(command.log.open("ab")) if command.log is not None else None
            self._process = await asyncio.create_subprocess_exec(
                *command.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=held.enter_context(self._ear()) if command.tells_when_ready else output,
                stderr=output,
                env=dict(command.environment),
                pass_fds=command.descriptors,
                start_new_session=True,
            )
        if self._stopping.is_set():  # told while it was being started: nobody has sent it a signal
            self._kill_group()
        try:
            return await self._process.wait()
        finally:
            self._kill_group()  # whatever the child left behind in its group

    @contextmanager
    def _ear(self) -> Iterator[int]:
        """What the child gets for standard output; no pipe of asyncio's, whose `wait` waits for grandchildren too."""
        ours, theirs = os.pipe()
        asyncio.get_running_loop().add_reader(ours, self._hear, ours)
        try:
            yield theirs
        finally:
            os.close(theirs)

    def _hear(self, ours: int) -> None:
        said = os.read(ours, 65_536)
        if READY in said:
            self._is_ready = True
            self._news.set()
        if not said:
            asyncio.get_running_loop().remove_reader(ours)
            os.close(ours)

    def _kill_group(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def restart(self) -> None:
        """As `stop`, and started anew at once; this is no death that counts. Returns when the old one is gone."""
        self._restarting = self._process is not None and self._process.returncode is None
        await self._end(signal.SIGTERM)

    async def stop(self, number: int = signal.SIGTERM) -> None:
        """A signal, time to drain, then SIGKILL for the whole group."""
        self._stopping.set()
        await self._end(number)

    async def _end(self, number: int) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.send_signal(number)
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
