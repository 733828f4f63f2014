"""`tailor up`: replicas, gateway, training workers of one machine: supervised, restarted in turn, drained on Ctrl-C."""

import asyncio
import fcntl
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Final

import msgspec

from gateway.home import ConfigurationError, Home
from gateway.logs import set_up_logging
from gateway.replicas.launch import device_of, replica_command
from gateway.replicas.supervisor import Child, Command
from gateway.replicas.upstream import Upstream, UpstreamError
from gateway.server import ports_of
from gateway.settings import Settings
from gateway.signals import until_stopped
from gateway.workers import WorkerFailed, Workers

UNIX_PATH_LIMIT: Final = 100  # the kernel's is 107 bytes
START_TRIES: Final = 2
LOOK_S: Final = 0.25
LOCK_S: Final = 0.5  # who asks whether a stack runs has its lock for a moment
STATE_BYTES: Final = 4_096
REPLICA_START_S: Final = 600.0
HEARD_EVERYWHERE_S: Final = 1.5  # by then every worker has read in the change feed that a replica is drained

Tell = Callable[[str], None]
ReplicaLaunch = Callable[[int, str], tuple[Sequence[str], Mapping[str, str]]]
"""Number of the replica and where it listens → its command line and environment."""


class RestartFailed(Exception):
    """A part did not come back; what had not been restarted yet still runs as before."""


@dataclass(frozen=True, slots=True)
class LocalReplica:
    """One of this machine's replicas."""

    url: str
    child: Child


class StackState(msgspec.Struct):
    """What `up.lock` tells of the stack that holds it."""

    pid: int
    restarts: int = 0
    fault: str | None = None
    """Why the last one of them broke off."""


class StackLock:
    """The home folder's lock: two stacks on one home would share sockets and logs."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._state = StackState(os.getpid())
        self._write()

    def count_restart(self, fault: str | None) -> None:
        self._state = StackState(self._state.pid, self._state.restarts + 1, fault and fault[:1_000])
        self._write()

    def _write(self) -> None:
        os.pwrite(self._file.fileno(), msgspec.json.encode(self._state).ljust(STATE_BYTES), 0)  # never half of it


class GatewayApi:
    """What the stack asks its own gateway."""

    def __init__(self, url: str, home: Home) -> None:
        self._upstream = Upstream(url)
        self._home = home

    async def ready_replicas(self) -> int:
        """How many replicas take requests; -1 while there is no gateway to ask."""
        try:
            _, body = await self._call("GET", "/ready")
        except UpstreamError:
            return -1
        count: int = body["replicas_ready"] if body["database"] else 0
        return count

    async def replica(self, url: str) -> dict[str, Any] | None:
        """The replica at that address; None where nobody tells."""
        try:
            status, body = await self._call("GET", "/admin/v1/replicas")
        except UpstreamError:
            return None
        return next((found for found in body["data"] if found["url"] == url), None) if status == 200 else None

    async def post(self, path: str) -> bool:
        """Whether an operator's call was taken."""
        try:
            status, _ = await self._call("POST", path)
        except UpstreamError:
            return False
        return status == 200

    async def _call(self, method: str, path: str) -> tuple[int, dict[str, Any]]:
        lines = [f"{method} {path} HTTP/1.1", f"host: {self._upstream.host_header}", "content-length: 0"]
        if key := self._home.operator_key():
            lines.append(f"authorization: Bearer {key}")
        connection = await self._upstream.send("\r\n".join([*lines, "", ""]).encode())
        body = await connection.read_all()
        self._upstream.release(connection)
        return connection.status, msgspec.json.decode(body, type=dict[str, Any])

    def close(self) -> None:
        self._upstream.close()


class Stack:
    """The running processes of one `tailor up`."""

    def __init__(
        self,
        settings: Settings,
        home: Home,
        workers: Workers,
        replicas: Sequence[LocalReplica],
        trainers: Sequence[Child],
        lock: StackLock,
        tell: Tell,
    ) -> None:
        self.url = settings.url
        self.home = home
        self.workers = workers
        self.replicas = replicas
        self._trainers = trainers
        self._lock = lock
        self._tell = tell
        self._one_by_one = len(replicas) > 1 and device_of(settings.device) == "cpu"
        self._drain_s = settings.drain_s
        self._api = GatewayApi(self.url, home)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._tasks = [asyncio.create_task(self._start_workers()), asyncio.create_task(self._start_replicas())]
        self._tasks += [asyncio.create_task(trainer.run()) for trainer in self._trainers]

    async def _start_workers(self) -> None:
        with suppress(WorkerFailed):  # `wait_ready` tells
            await self.workers.start(tries=START_TRIES)

    async def _start_replicas(self) -> None:
        """All at once, but on a CPU one after the other: there two starts take longer side by side than in turn."""
        for number, replica in enumerate(self.replicas):
            self._tasks.append(asyncio.create_task(replica.child.run()))
            if self._one_by_one:
                await self._until_ready(number + 1, REPLICA_START_S)
        if len(self.replicas) > 1 and await self._until_ready(len(self.replicas), REPLICA_START_S):
            self._tell(f"all {len(self.replicas)} replicas are ready")

    async def _until_ready(self, count: int, patience_s: float) -> bool:
        deadline = time.monotonic() + patience_s
        while time.monotonic() < deadline:
            if await self._api.ready_replicas() >= count:
                return True
            await asyncio.sleep(LOOK_S)
        return False

    async def wait_ready(self) -> int:
        """How many replicas are ready, once a request would be answered.

        Raises:
            ConfigurationError: a process keeps dying before anything was ever ready; the text has its last words.
        """
        while (count := await self._api.ready_replicas()) < 1:
            for child in (*self.workers.children, *(replica.child for replica in self.replicas)):
                if child.restarts >= START_TRIES:
                    raise ConfigurationError(
                        f"{child.command.name} does not start. Its last words, from {child.command.log}:\n"
                        + _tail(child.command.log)
                    )
            await asyncio.sleep(LOOK_S)
        return count

    async def restart(self) -> None:
        """Replicas one after the other, then the gateway's workers: with two replicas no request fails.

        Where a part does not come back, it is told, and what has not been restarted yet goes on as it is.
        """
        fault = None
        try:
            await self._restart_each()
        except RestartFailed as error:
            fault = str(error)
        self._tell(fault or "restarted")
        self._lock.count_restart(fault)

    async def _restart_each(self) -> None:
        if len(self.replicas) == 1:
            self._tell("one replica: requests get 503 until it is back")
        for replica in self.replicas:
            await self._restart_replica(replica)
        self._tell("restarting the gateway")
        try:
            await self.workers.replace_all()
        except WorkerFailed as error:
            raise RestartFailed(f"{error}; the gateway that ran before still runs") from error
        await asyncio.gather(*(trainer.restart() for trainer in self._trainers))

    async def _restart_replica(self, replica: LocalReplica) -> None:
        name = replica.child.command.name
        before = await self._api.replica(replica.url)
        if before is None or not await self._api.post(f"/admin/v1/replicas/{before['id']}/drain"):
            self._tell(f"{name} is restarted without draining: the gateway takes no operator's call")
        else:
            self._tell(f"draining {name}")
            await self._until_drained(replica.url)
        self._tell(f"restarting {name}")
        await replica.child.restart()
        if before is None:
            await self._until_ready(len(self.replicas), REPLICA_START_S)
            return
        back = await self._until_back(replica, before["generation"])
        await self._api.post(f"/admin/v1/replicas/{before['id']}/resume")
        if not back:
            raise RestartFailed(
                f"{name} did not come back within {REPLICA_START_S:.0f} s: see {replica.child.command.log}"
            )

    async def _until_drained(self, url: str) -> None:
        deadline = time.monotonic() + self._drain_s
        await asyncio.sleep(HEARD_EVERYWHERE_S)
        while time.monotonic() < deadline:
            now = await self._api.replica(url)
            if now is not None and now["state"] != "draining":
                return
            await asyncio.sleep(LOOK_S)

    async def _until_back(self, replica: LocalReplica, old_generation: str | None) -> bool:
        deadline = time.monotonic() + REPLICA_START_S
        while time.monotonic() < deadline:
            now = await self._api.replica(replica.url)
            if now is not None and now["generation"] != old_generation and now["state"] in ("drained", "ready"):
                return True
            await asyncio.sleep(LOOK_S)
        return False

    async def stop(self) -> None:
        """Drain the gateway, then stop the replicas."""
        self._api.close()
        await self.workers.stop()
        children = (*(replica.child for replica in self.replicas), *self._trainers)
        await asyncio.gather(*(child.stop() for child in children))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def kill(self) -> None:
        """At once, without draining."""
        self.workers.kill()
        for child in (*(replica.child for replica in self.replicas), *self._trainers):
            child.kill()


@asynccontextmanager
async def running_stack(settings: Settings, tell: Tell, launch: ReplicaLaunch | None = None) -> AsyncIterator[Stack]:
    """Start replicas and gateway; on leaving, drain the gateway, then stop the replicas, whatever happened.

    Raises:
        ConfigurationError: something the stack needs is missing or taken; nothing is left running.
    """
    home = Home(settings.home)
    base_model, base_name = home.base_model(settings.base_model, settings.base_model_name)
    ports = ports_of(settings)
    async with AsyncExitStack() as held:
        for each in ports:
            held.callback(each.close)
        lock = held.enter_context(_only_stack_of(home))
        run = held.enter_context(_run_folder(home, settings.local_replicas))
        logs = home.path / "logs"
        logs.mkdir(exist_ok=True)
        launch = launch or _vllm(settings, home, base_model, base_name)
        replicas = [_replica(number, run, logs, launch, settings.drain_s) for number in range(settings.local_replicas)]
        overrides = {
            "TAILOR_HOME": str(home.path),
            "TAILOR_BASE_MODEL": str(base_model),
            "TAILOR_BASE_MODEL_NAME": base_name,
            "TAILOR_REPLICAS": ",".join(replica.url for replica in replicas),
            "TAILOR_HOST": settings.host,
            "TAILOR_PORT": str(settings.port),
        }
        workers = Workers(
            ports,
            {**os.environ, **overrides},
            log_file=logs / "gateway.log",
            drain_s=settings.drain_s,
            notice_s=settings.drain_notice_s,
        )
        trainers = [
            _trainer(number, logs, {**os.environ, **overrides}, settings.drain_s)
            for number in range(_trainers(settings))
        ]
        stack = Stack(settings, home, workers, replicas, trainers, lock, tell)
        stack.start()
        try:
            yield stack
        finally:
            tell("stopping: running requests get their time, then the engine goes")
            await stack.stop()


def _vllm(settings: Settings, home: Home, base_model: Path, base_name: str) -> ReplicaLaunch:
    token = home.replica_token(settings.replica_token)

    def launch(number: int, listen: str) -> tuple[Sequence[str], Mapping[str, str]]:
        argv, environment = replica_command(
            settings,
            home,
            base_model=base_model,
            base_name=base_name,
            listen=listen,
            token=token,
            number=number,
            count=settings.local_replicas,
        )
        return [*argv, "--with-parent"], environment

    return launch


def _replica(number: int, run: Path, logs: Path, launch: ReplicaLaunch, stop_s: float) -> LocalReplica:
    name = f"replica-{number}"
    socket = run / f"{name}.sock"
    argv, environment = launch(number, f"unix:{socket}")
    command = Command(name, argv, environment, logs / f"{name}.log", prepare=lambda: socket.unlink(missing_ok=True))
    return LocalReplica(f"unix:{socket}", Child(command, stop_s=stop_s))


def _trainers(settings: Settings) -> int:
    """How many training workers to start: one, where there is what it needs. It loads that with its first job."""
    if settings.training_workers is not None:
        return settings.training_workers
    return 1 if all(find_spec(name) is not None for name in ("torch", "peft", "transformers")) else 0


def _trainer(number: int, logs: Path, environment: Mapping[str, str], stop_s: float) -> Child:
    name = f"training-worker-{number}"
    argv = [sys.executable, "-m", "gateway.training_worker", "--with-parent"]
    return Child(Command(name, argv, environment, logs / f"{name}.log"), stop_s=stop_s)


@contextmanager
def _only_stack_of(home: Home) -> Iterator[StackLock]:
    """Raises ConfigurationError where another stack uses the home."""
    path = _lock_file(home)
    path.touch(mode=0o600)
    with path.open("r+b") as file:
        deadline = time.monotonic() + LOCK_S
        while not _lock(file):
            if time.monotonic() > deadline:
                raise ConfigurationError(
                    f"Another 'tailor up' uses {home.path}: stop it or set TAILOR_HOME to another folder."
                )
            time.sleep(LOCK_S / 20)
        file.truncate(0)  # the last stack's number may be another process's by now
        yield StackLock(file)


def _lock(file: IO[bytes]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_file(home: Home) -> Path:
    return home.path / "up.lock"


@contextmanager
def _run_folder(home: Home, replicas: int) -> Iterator[Path]:
    """Where sockets are: below the home folder, or a short temporary one where that path is too long for a socket."""
    run = home.path / "run"
    if len(str(run / f"replica-{replicas - 1}.sock")) <= UNIX_PATH_LIMIT:
        run.mkdir(mode=0o700, exist_ok=True)
        yield run
        return
    with tempfile.TemporaryDirectory(prefix="tailor-") as short:
        yield Path(short)


def _tail(log: Path | None, lines: int = 15) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log is not None else ""
    except FileNotFoundError:
        return "(nothing was written)"


def restart_running_stack(home: Home) -> None:
    """Have the `tailor up` of this home restart all its parts in turn, and return when it has.

    Raises:
        ConfigurationError: none runs, it ended meanwhile, or a part did not come back.
    """
    before = _running(home)
    if before is None:
        raise ConfigurationError(f"No 'tailor up' uses {home.path}: start one, or set TAILOR_HOME to its folder.")
    os.kill(before.pid, signal.SIGHUP)
    while (now := _running(home)) is not None:
        if now.restarts > before.restarts:
            if now.fault is not None:
                raise ConfigurationError(now.fault)
            return
        time.sleep(LOOK_S)
    raise ConfigurationError("'tailor up' has ended meanwhile.")


def _running(home: Home) -> StackState | None:
    """The stack that holds the lock; None where nobody does."""
    try:
        with _lock_file(home).open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return msgspec.json.decode(file.read().strip(), type=StackState)
    except (FileNotFoundError, msgspec.DecodeError):  # no stack ever, or one that is just starting
        pass
    return None


async def run_up(settings: Settings, tell: Tell, launch: ReplicaLaunch | None = None) -> None:
    """Run the stack until SIGINT or SIGTERM; a second signal stops without draining, SIGHUP restarts its parts in turn.

    `launch` says how a replica is started: vLLM, where none is given.

    Raises:
        ConfigurationError: something is missing or taken, or a part does not start.
    """
    set_up_logging("WARNING")
    os.umask(0o077)
    first_start = Home(settings.home).operator_key() is None
    async with running_stack(settings, tell, launch) as stack:

        async def work(hangup: asyncio.Event) -> None:
            begin = time.monotonic()
            tell(f"starting the engine (half a minute or more); logs are in {stack.home.path / 'logs'}")
            count = await stack.wait_ready()
            tell(f"ready after {time.monotonic() - begin:.0f} s: {stack.url}/v1")
            if len(stack.replicas) > 1:
                tell(f"{count} of {len(stack.replicas)} replicas are up")
            tell(_greeting(stack, first_start))
            while await hangup.wait():
                hangup.clear()
                await stack.restart()

        await until_stopped(work, stack.kill)


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
