"""What is measured, started: the mock, nginx in front of it, and a real gateway with a tenant, a key and an adapter."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from loadtests.overhead.client import Target
from loadtests.overhead.model_files import adapter_files, write_base
from loadtests.overhead.processes import cpu_ns, on_core
from loadtests.ports import Ports

ADAPTER: Final = "support"
TOKEN: Final = "token-of-the-overhead-benchmark"  # noqa: S105  of a replica that is a mock
START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 60.0
TRACED: Final = 0.01
HIGH: Final = 1_000_000_000
PLAN: Final = {
    "name": "benchmark",
    "weight": 2.0,
    "requests_per_minute": HIGH,
    "tokens_per_minute": HIGH,
    "concurrent_requests": 100_000,
    "max_output_tokens": 100_000,
    "max_prompt_bytes": 1 << 20,
    "tokens_per_month": 1_000 * HIGH,
    "loads_per_minute": 1_000,
}
NGINX: Final = """\
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 4096; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    keepalive_requests 1000000000;
    upstream engine {{
        server 127.0.0.1:{upstream};
        keepalive 128;
        keepalive_requests 1000000000;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://engine;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering off;
        }}
    }}
}}
"""


class CannotMeasureError(Exception):
    """Something the benchmark needs is missing or does not start; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Start:
    """A process that was started, the time from exec to its first good answer, and the CPU it took till then."""

    process: "subprocess.Popen[bytes]"
    took_s: float
    cpu_s: float


free_port: Final = Ports(range(30_000, 32_768)).free


@contextmanager
def running(
    command: Sequence[str],
    url: str,
    *,
    core: int | None,
    log: Path,
    env: Mapping[str, str],
    timeout_s: float = START_TIMEOUT_S,
) -> Iterator[Start]:
    """A process on its core, or on any, until the block ends; entered once `url` answers 200.

    Raises:
        CannotMeasureError: it ends or does not answer; its last words are in the text.
    """
    with log.open("wb") as out, on_core(core) if core is not None else nullcontext():
        begin = time.monotonic()
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        _wait(url, process, log, timeout_s)
        yield Start(process, time.monotonic() - begin, cpu_ns([process.pid]) / 1e9)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(url: str, process: "subprocess.Popen[bytes]", log: Path, timeout_s: float) -> None:
    stop = time.monotonic() + timeout_s
    with httpx.Client(timeout=2, trust_env=False) as http:
        while process.poll() is None and time.monotonic() < stop:
            try:
                if http.get(url).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.01)
    raise CannotMeasureError(f"{url} does not answer. Its process's last words:\n{log.read_text()[-2_000:]}")


def nginx_path() -> str:
    """Where nginx is.

    Raises:
        CannotMeasureError: nowhere.
    """
    found = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is None:
        raise CannotMeasureError("nginx is not installed: apt-get install nginx-light, or put another build on PATH.")
    return found


@contextmanager
def mock_upstream(folder: Path, fingerprint: str, core: int | None) -> Iterator[int]:
    """The mock's port."""
    port = free_port()
    command = [sys.executable, "-m", "loadtests.overhead.mock", "--port", str(port), "--fingerprint", fingerprint]
    url = f"http://127.0.0.1:{port}/v1/models"
    with running(command, url, core=core, log=folder / "mock.log", env=os.environ):
        yield port


@contextmanager
def nginx(folder: Path, upstream_port: int, core: int) -> Iterator[Target]:
    """A reverse proxy of one worker, configured as its documentation would for server-sent events."""
    port = free_port()
    folder.mkdir()
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, upstream=upstream_port, port=port))
    command = [nginx_path(), "-c", str(config), "-p", str(folder), "-e", str(folder / "error.log")]
    url = f"http://127.0.0.1:{port}/v1/models"
    with running(command, url, core=core, log=folder / "out.log", env=os.environ):
        yield Target("nginx", port)


def base_model(folder: Path) -> tuple[Path, str]:
    """The base model's folder and its fingerprint."""
    base = write_base(folder)
    return base, fingerprint_of(base)


def fingerprint_of(base: Path) -> str:
    """As a Tailor process computes it."""
    program = "import sys; from pathlib import Path; from adapter_store.base_model import BaseModel; "
    program += "print(BaseModel.read(Path(sys.argv[1])).fingerprint)"
    done = subprocess.run([sys.executable, "-c", program, str(base)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@dataclass(frozen=True, slots=True)
class Gateway:
    """How a gateway is started in front of the mock; every start has the same home."""

    folder: Path
    base: Path
    upstream_port: int
    core: int | None
    settings: Mapping[str, str]

    @contextmanager
    def started(self) -> Iterator["RunningGateway"]:
        """A gateway that is ready, until the block ends."""
        port, operator_port = free_port(), free_port()
        env = {name: value for name, value in os.environ.items() if not name.startswith(("TAILOR_", "OTEL_"))}
        upstream = f"http://127.0.0.1:{self.upstream_port}"
        env |= {
            "TAILOR_HOME": str(self.folder / "home"),
            "TAILOR_BASE_MODEL": str(self.base),
            "TAILOR_PORT": str(port),
            "TAILOR_OPERATOR_PORT": str(operator_port),
            "TAILOR_REPLICAS": upstream,
            "TAILOR_REPLICA_TOKEN": TOKEN,
            "TAILOR_LOG_LEVEL": "WARNING",
            "TAILOR_PROOF": "off",  # the mock answers no golden prompts
            "OTEL_SERVICE_NAME": "tailor-overhead",
            "OTEL_EXPORTER_OTLP_ENDPOINT": upstream,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
            "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
            "OTEL_TRACES_SAMPLER_ARG": str(TRACED),
            **self.settings,
        }
        command = [sys.executable, "-m", "gateway.server"]
        url = f"http://127.0.0.1:{port}/ready"
        with running(command, url, core=self.core, log=self.folder / "gateway.log", env=env) as start:
            yield RunningGateway(self.folder / "home", port, operator_port, start)


@dataclass(frozen=True, slots=True)
class RunningGateway:
    """A gateway that answers, and what an operator and a tenant do with it over HTTP."""

    home: Path
    port: int
    operator_port: int
    start: Start

    def target(self) -> Target:
        """The gateway as a new tenant sees it, with a plan that has every limit set and with an adapter of its own."""
        with self._client((self.home / "operator-key").read_text().strip()) as operator:
            plan = self._make_plan(operator)
            tenant = _created(operator.post("/admin/v1/tenants", json={"name": "benchmark", **plan}))
            key = _created(operator.post(f"/admin/v1/tenants/{tenant['id']}/keys", json={"label": "benchmark"}))
        with self._client(str(key["secret"])) as owner:
            _created(owner.post("/v1/adapters", data={"name": ADAPTER}, files=adapter_files()))
        return Target("gateway", self.port, str(key["secret"]), ADAPTER)

    def _make_plan(self, operator: httpx.Client) -> dict[str, str]:
        answer = operator.post("/admin/v1/plans", json=PLAN)
        return {"plan": str(_created(answer)["name"])} if answer.status_code != 404 else {}

    def metrics(self) -> str:
        """The operator port's Prometheus text; empty where there is none."""
        try:
            return httpx.get(f"http://127.0.0.1:{self.operator_port}/metrics", trust_env=False).text
        except httpx.TransportError:
            return ""

    def _client(self, key: str) -> httpx.Client:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.Client(base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=60, trust_env=False)


def _created(answer: httpx.Response) -> dict[str, Any]:
    if answer.status_code not in (200, 201):
        raise CannotMeasureError(f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text}")
    body: dict[str, Any] = answer.json()
    return body
