"""One real stack for the whole run: `tailor up` with a real vLLM on this machine, and adapters that PEFT saved.

The engine takes most of a minute to start, so it starts once and is shared; whoever kills it comes last.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from adapter_store.bundle import BUNDLE_FILES
from gateway.local_training import cached_tiny_base
from gateway.progress_bar import progress_bar
from tests.ports import free_port
from tests.random_adapters import save_random_adapter

PROJECT = Path(__file__).parents[2]
READY_S = 420.0
MAX_MODEL_LEN = 512


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whichever test comes first starts the engine: it gets the time for that beside its own."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(READY_S + 300))


@dataclass
class RealStack:
    """A running `tailor up`."""

    process: subprocess.Popen[bytes]
    home: Path
    url: str
    base: Path
    output: Path

    @property
    def environment(self) -> dict[str, str]:
        return {**clean_environment(), "TAILOR_HOME": str(self.home), "TAILOR_URL": self.url}

    def tailor(self, *arguments: str, key: str | None = None, expect: int = 0) -> str:
        """Run the command as a person would; returns what it printed."""
        environment = {**self.environment, **({"TAILOR_API_KEY": key} if key else {})}
        command = [str(Path(sys.executable).parent / "tailor"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode == expect, f"{done.stdout}\n{done.stderr}"
        return done.stdout if expect == 0 else done.stderr

    @property
    def operator_key(self) -> str:
        return (self.home / "operator-key").read_text().strip()

    @property
    def replica_token(self) -> str:
        """What the replica asks for of whoever asks it past the gateway."""
        return (self.home / "replica-token").read_text().strip()

    def new_tenant(self, name: str) -> str:
        """A tenant's key; over HTTP, for the command takes a second of CPU each time."""
        with self.client(self.operator_key) as client:
            assert client.post("/admin/v1/tenants", json={"name": name}).status_code == 201
            secret: str = client.post(f"/admin/v1/tenants/{name}/keys", json={}).json()["secret"]
        return secret

    def push(self, folder: Path, name: str, key: str) -> None:
        """Publish what PEFT saved; over HTTP likewise."""
        with self.client(key) as client:
            files = {file: (file, (folder / file).read_bytes()) for file in BUNDLE_FILES}
            made = client.post(f"/v1/adapters/{name}/versions", files=files)
        assert made.status_code == 201, made.text

    def client(self, key: str) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"authorization": f"Bearer {key}"}, timeout=120)

    def async_client(self, key: str) -> httpx.AsyncClient:
        return httpx.AsyncClient(base_url=self.url, headers={"authorization": f"Bearer {key}"}, timeout=120)

    def replica_state(self, listens_at: str | None = None) -> dict[str, Any]:
        """What the agent in the engine says; of several the one whose socket is given."""
        state: dict[str, Any] = json.loads(self.of_replica("/tailor/state", listens_at))
        return state

    def of_replica(self, path: str, listens_at: str | None = None) -> str:
        """What the replica answers, asked past the gateway."""
        with socket.socket(socket.AF_UNIX) as link:  # httpcore leaks its own where nobody listens (any more)
            link.settimeout(30)
            link.connect(listens_at or self.replica_socket())
            connection = http.client.HTTPConnection("replica")
            connection.sock = link
            with closing(connection):
                connection.request("GET", path, headers={"authorization": f"Bearer {self.replica_token}"})
                with connection.getresponse() as answer:
                    assert answer.status == 200
                    return answer.read().decode()

    def generation(self) -> str | None:
        """The engine's generation; None while there is no engine to ask."""
        try:
            found: str = self.replica_state()["generation"]
        except (OSError, http.client.HTTPException, AssertionError, psutil.NoSuchProcess):
            return None
        return found

    def replica_socket(self) -> str:
        """Where the engine listens: below the home folder, or a short path where that one is too long."""
        for process in self.descendants():
            command = process.cmdline()
            if "--uds" in command:
                return command[command.index("--uds") + 1]
        raise AssertionError("no replica runs")

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_ready(self, deadline_s: float = READY_S) -> None:
        deadline = time.monotonic() + deadline_s
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.output.read_text()
            try:
                if httpx.get(f"{self.url}/ready", timeout=10).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.25)
        raise AssertionError(f"not ready: {self.output.read_text()}\n{_tail(self.home / 'logs' / 'replica-0.log')}")


@pytest.fixture(scope="session")
def tiny_base() -> Path:
    """The tiny base, built once and kept in the project's cache."""
    return cached_tiny_base(PROJECT / ".tailor" / "cache", progress_bar)


@pytest.fixture(scope="session")
def stack(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealStack]:
    settings = {
        "TAILOR_ADAPTER_SLOTS": "4",
        "TAILOR_HOST_ADAPTERS": "6",
        "TAILOR_ALLOWED_FIELDS": "return_token_ids",  # to compare with PEFT token by token
        "TAILOR_TOOL_CALL_PARSER": "pythonic",  # so that clients may leave the choice to the model
        # a weak model held to a schema would say spaces without end
        "TAILOR_VLLM_ARGS": "--structured-outputs-config.disable_any_whitespace=true",
        "TAILOR_PROOF_DELAY_S": "0",
        "TAILOR_PROBE_DEADLINE_S": "20",  # the machine is shared: a slow token is not a frozen engine
        "TAILOR_TRAINING_NICE": "0",
    }
    with real_stack(tiny_base, tmp_path_factory.mktemp("stack") / "home", **settings) as stack:
        yield stack


@contextmanager
def real_stack(tiny_base: Path, home: Path, ready_s: float = READY_S, /, **more: str) -> Iterator[RealStack]:
    """`tailor up` on ports of its own, until the block ends."""
    output = home.parent / "up.log"
    settings = {
        "TAILOR_HOME": str(home),
        "TAILOR_PORT": str(port := free_port()),
        "TAILOR_OPERATOR_PORT": str(free_port()),
        "TAILOR_MAX_MODEL_LEN": str(MAX_MODEL_LEN),
        **more,
    }
    command = [str(Path(sys.executable).parent / "tailor"), "up", "--base-model", str(tiny_base)]
    with output.open("wb") as log:
        process = subprocess.Popen(command, env={**clean_environment(), **settings}, stdout=log, stderr=log)
    stack = RealStack(process, home, f"http://127.0.0.1:{port}", tiny_base, output)
    try:
        stack.wait_ready(ready_s)
        yield stack
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(90)


@pytest.fixture(scope="session")
def adapters(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twelve adapters, each with an answer of its own to the same question."""
    folder = tmp_path_factory.mktemp("adapters")
    return [save_random_adapter(tiny_base, folder / f"adapter-{seed}", seed=seed) for seed in range(12)]


def clean_environment() -> dict[str, str]:
    """This process's environment without a developer's own settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith("TAILOR_")}


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-30:]) if log.exists() else ""
