"""`tailor up`: replica and gateway on one machine, supervised, drained and gone on Ctrl-C."""

import asyncio
import fcntl
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO

from gateway.home import ConfigurationError, Home
from gateway.listening import bind
from gateway.logs import set_up_logging
from gateway.replicas.launch import replica_command
from gateway.replicas.supervisor import Child, Command
from gateway.replicas.upstream import Upstream, UpstreamError
from gateway.settings import Settings

UNIX_PATH_LIMIT = 100  # the kernel's is 107 bytes
START_TRIES = 2


class Stack:
    """The running processes of one `tailor up`."""

    def __init__(self, settings: Settings, home: Home, gateway: Child, replica: Child) -> None:
        self.url = settings.url
        self.home = home
        self.gateway = gateway
        self.replica = replica
        self._upstream = Upstream(self.url)

    async def wait_ready(self) -> None:
        """Return once a request would be answered.

        Raises:
            ConfigurationError: a process keeps dying before it was ever ready; the text has its last words.
        """
        while not await self._is_ready():
            for child in (self.gateway, self.replica):
                if child.restarts >= START_TRIES:
                    raise ConfigurationError(
                        f"{child.command.name} does not start. Its last words, from {child.command.log}:\n"
                        + _tail(child.command.log)
                    )
            await asyncio.sleep(0.25)

    async def _is_ready(self) -> bool:
        request = f"GET /ready HTTP/1.1\r\nhost: {self._upstream.host_header}\r\n\r\n".encode()
        try:
            connection = await self._upstream.send(request)
            await connection.read_all()
        except UpstreamError:
            return False
        self._upstream.release(connection)
        return connection.status == 200

    def close(self) -> None:
        self._upstream.close()


@asynccontextmanager
async def running_stack(settings: Settings, tell: Callable[[str], None]) -> AsyncIterator[Stack]:
    """Start replica and gateway; on leaving, drain the gateway, then stop the replica, whatever happened.

    Raises:
        ConfigurationError: something the stack needs is missing or taken; nothing is left running.
    """
    home = Home(settings.home)
    base_model, base_name = home.base_model(settings.base_model, settings.base_model_name)
    bind(settings.host, settings.port).close()
    async with AsyncExitStack() as held:
        held.enter_context(_only_stack_of(home))
        run = held.enter_context(_run_folder(home))
        gateway, replica = _children(settings, home, base_model, base_name, run)
        tasks = [asyncio.create_task(replica.run()), asyncio.create_task(gateway.run())]
        stack = Stack(settings, home, gateway, replica)
        try:
            yield stack
        finally:
            stack.close()
            tell("stopping: running requests get their time, then the engine goes")
            await gateway.stop()
            await replica.stop()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def _children(settings: Settings, home: Home, base_model: Path, base_name: str, run: Path) -> tuple[Child, Child]:
    logs = home.path / "logs"
    logs.mkdir(exist_ok=True)
    socket = run / "replica-0.sock"
    token = home.replica_token(settings.replica_token)
    argv, environment = replica_command(
        settings, home, base_model=base_model, base_name=base_name, listen=f"unix:{socket}", token=token
    )
    replica = Command(
        "replica-0",
        [*argv, "--with-parent"],
        environment,
        logs / "replica-0.log",
        prepare=lambda: socket.unlink(missing_ok=True),
    )
    overrides = {
        "TAILOR_HOME": str(home.path),
        "TAILOR_BASE_MODEL": str(base_model),
        "TAILOR_BASE_MODEL_NAME": base_name,
        "TAILOR_REPLICAS": f"unix:{socket}",
        "TAILOR_HOST": settings.host,
        "TAILOR_PORT": str(settings.port),
    }
    gateway = Command(
        "gateway",
        [sys.executable, "-m", "gateway.server", "--with-parent"],
        {**os.environ, **overrides},
        logs / "gateway.log",
    )
    return Child(gateway, stop_s=settings.drain_s + 5), Child(replica, stop_s=settings.drain_s)


@contextmanager
def _only_stack_of(home: Home) -> Iterator[IO[str]]:
    """Two stacks on one home would share sockets and logs: the second is refused."""
    with (home.path / "up.lock").open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(
                f"Another 'tailor up' uses {home.path}: stop it or set TAILOR_HOME to another folder."
            ) from error
        yield lock


@contextmanager
def _run_folder(home: Home) -> Iterator[Path]:
    """Where sockets are: below the home folder, or a short temporary one where that path is too long for a socket."""
    run = home.path / "run"
    if len(str(run / "replica-0.sock")) <= UNIX_PATH_LIMIT:
        run.mkdir(mode=0o700, exist_ok=True)
        yield run
        return
    with tempfile.TemporaryDirectory(prefix="tailor-") as short:
        yield Path(short)


def _tail(log: Path, lines: int = 15) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except FileNotFoundError:
        return "(nothing was written)"


async def run_up(settings: Settings, tell: Callable[[str], None]) -> None:
    """Run the stack until SIGINT or SIGTERM; a second signal stops without draining."""
    set_up_logging("WARNING")
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    os.umask(0o077)
    first_start = Home(settings.home).operator_key() is None
    async with running_stack(settings, tell) as stack:

        def on_signal() -> None:
            if stop.is_set():
                stack.gateway.kill()
                stack.replica.kill()
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        begin = time.monotonic()
        tell(f"starting the engine (half a minute or more); logs are in {stack.home.path / 'logs'}")
        ready = asyncio.create_task(stack.wait_ready())
        stopped = asyncio.create_task(stop.wait())
        await asyncio.wait({ready, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if ready.done():
            ready.result()
            tell(f"ready after {time.monotonic() - begin:.0f} s: {stack.url}/v1")
            tell(_greeting(stack, first_start))
        ready.cancel()
        await stopped


def _greeting(stack: Stack, first_start: bool) -> str:
    lines = []
    key = stack.home.operator_key()
    if first_start and key is not None:
        lines.append(f"operator key: {key}")
        lines.append(f"  (shown this once; kept in {stack.home.operator_key_file}, for the command on this machine)")
    lines += [
        "next:  tailor tenant create acme",
        "       tailor key create acme",
        "Ctrl-C drains and stops everything.",
    ]
    return "\n".join(lines)
