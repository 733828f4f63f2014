"""Several gateway processes that share a port: started, watched, replaced one by one, and stopped together.

The sockets are opened here and inherited. So a connection that waits in one's queue outlives the worker that should
have taken it: the next worker does. This process serves nothing, and imports nothing that serves.
"""

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from gateway.home import ConfigurationError, Home
from gateway.listening import Ports, let_no_more_in
from gateway.logs import set_up_logging
from gateway.replicas.supervisor import Child, Command
from gateway.server import ports_of
from gateway.settings import Settings
from gateway.signals import until_stopped

log = logging.getLogger("tailor.workers")
START_S: Final = 120.0
STOP_MARGIN_S: Final = 5.0


class WorkerFailed(Exception):
    """A worker ended, or was not ready in time."""


class Workers:
    """The workers of one gateway.

    `environment` is theirs, `log_file` takes their output (None: this process's own).
    """

    def __init__(
        self,
        ports: Sequence[Ports],
        environment: Mapping[str, str],
        *,
        log_file: Path | None,
        drain_s: float,
        notice_s: float,
    ) -> None:
        self._ports = ports
        self._environment = environment
        self._log_file = log_file
        self._notice_s = notice_s
        self._stop_s = notice_s + drain_s + STOP_MARGIN_S
        self._children: list[Child] = []
        self._runs: dict[Child, asyncio.Task[None]] = {}  # of old and new ones while they are being replaced too

    @property
    def children(self) -> Sequence[Child]:
        """One per worker, in order; fewer while they start."""
        return tuple(self._children)

    async def start(self, *, tries: int = 1) -> None:
        """The first worker, and when it serves the others: it alone meets an empty home, an old schema, a fault.

        Raises:
            WorkerFailed: it has ended so many times, and never served.
        """
        self._children.append(self._launch(0))
        await self._served(self._children[0], tries)
        for number in range(1, len(self._ports)):
            self._children.append(self._launch(number))

    async def replace_all(self) -> None:
        """A new process for each worker, in turn; the old one ends its requests once the new one serves.

        Raises:
            WorkerFailed: a new one does not serve; its predecessor and those after it stay.
        """
        for number, old in enumerate(self._children):
            new = self._launch(number)
            try:
                await self._served(new, 1)
            except WorkerFailed:
                await new.stop()
                raise
            self._children[number] = new
            await old.stop(signal.SIGHUP)

    async def stop(self) -> None:
        """Drain all of them; afterwards nobody listens."""
        stops = asyncio.gather(*(child.stop() for child in self._runs))
        await asyncio.wait([stops], timeout=self._notice_s)
        for ports in self._ports:
            let_no_more_in(ports.public)
            ports.close()  # theirs are copies: the socket ends with the last
        await stops
        await asyncio.gather(*self._runs.values())

    def kill(self) -> None:
        """At once, without draining."""
        for child in self._runs:
            child.kill()

    def _launch(self, number: int) -> Child:
        ports = self._ports[number]
        argv = [sys.executable, "-m", "gateway.server", "--with-parent", "--worker", str(number)]
        argv += ["--listener", str(ports.public.fileno())]
        descriptors = [ports.public.fileno()]
        if ports.operators is not None:
            argv += ["--operators", str(ports.operators.fileno())]
            descriptors.append(ports.operators.fileno())
        name = "gateway" if len(self._ports) == 1 else f"gateway worker {number}"
        command = Command(name, argv, self._environment, self._log_file, descriptors=descriptors, tells_when_ready=True)
        child = Child(command, stop_s=self._stop_s)
        self._runs[child] = run = asyncio.create_task(child.run())
        run.add_done_callback(lambda _: self._runs.pop(child))
        return child

    async def _served(self, child: Child, tries: int) -> None:
        try:
            async with asyncio.timeout(START_S):
                if await child.becomes_ready(tries):
                    return
        except TimeoutError:
            raise WorkerFailed(f"{child.command.name} does not serve after {START_S:.0f} s") from None
        raise WorkerFailed(f"{child.command.name} ended before it served")


async def run_workers(settings: Settings) -> None:
    """Run a gateway of several workers until SIGTERM or SIGINT; SIGHUP replaces them one by one.

    Raises:
        ConfigurationError: a port is taken, or the first worker does not start (it has said why).
    """
    set_up_logging(settings.log_level)
    os.umask(0o077)
    home = Home(settings.home)  # what the workers share is made here, once
    home.secret_key(settings.secret_key)
    home.replica_token(settings.replica_token)
    workers = Workers(
        ports_of(settings), os.environ, log_file=None, drain_s=settings.drain_s, notice_s=settings.drain_notice_s
    )

    async def work(hangup: asyncio.Event) -> None:
        await workers.start()
        while await hangup.wait():
            hangup.clear()
            try:
                await workers.replace_all()
            except WorkerFailed as error:
                log.error("%s: what runs stays", error)

    try:
        await until_stopped(work, workers.kill)
    except WorkerFailed as error:
        raise ConfigurationError(f"{error}.") from error
    finally:
        await workers.stop()
