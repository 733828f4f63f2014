"""A real gateway on a real socket, SQLite and a folder, in front of a fake replica that can be made to fail."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from pydantic import SecretStr

from adapter_store.base_model import BaseModel
from adapter_store.catalog import metadata
from adapter_store.transactions import reading
from gateway.app import create_app
from gateway.dependencies import Parts
from gateway.front import Front
from gateway.home import Home
from gateway.protocol import FrontProtocol
from gateway.settings import Settings
from loadtests.fake.replica import TOKEN, FakeReplica
from tests.bad_adapters import write_base, write_good
from tests.gateways import plain_client
from tests.storage import Shelf, shelf_of

BASE = "base"


@dataclass
class Tenant:
    """A customer with a live key."""

    name: str
    key: str
    client: httpx.AsyncClient

    async def publish(self, folder: Path, name: str = "bot") -> httpx.Response:
        files = {file.name: (file.name, file.read_bytes()) for file in folder.iterdir()}
        return await self.client.post("/v1/adapters", data={"name": name}, files=files)

    async def ask(self, model: str = "bot", **more: Any) -> httpx.Response:
        body = {"model": model, "messages": [{"role": "user", "content": "who are you?"}], **more}
        return await self.client.post("/v1/chat/completions", json=body)


@dataclass
class Gateway:
    """One running gateway."""

    url: str
    parts: Parts
    operator: httpx.AsyncClient
    home: Home
    front: Front
    clients: list[httpx.AsyncClient] = field(default_factory=list)

    @property
    def shelf(self) -> Shelf:
        """What lies in its blob store."""
        return shelf_of(self.home.path)

    def client(self, key: str | None = None) -> httpx.AsyncClient:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        client = plain_client(base_url=self.url, headers=headers, timeout=30)
        self.clients.append(client)
        return client

    async def tenant(self, name: str) -> Tenant:
        assert (await self.operator.post("/admin/v1/tenants", json={"name": name})).status_code == 201
        made = await self.operator.post(f"/admin/v1/tenants/{name}/keys", json={})
        secret = made.json()["secret"]
        return Tenant(name, secret, self.client(secret))

    async def tables_with(self, *texts: str) -> set[str]:
        """The tables with a row that has one of these texts in it."""
        async with reading(self.parts.engine) as connection:
            return {
                table.name
                for table in metadata.sorted_tables
                for row in await connection.execute(table.select())
                if any(text in str(tuple(row)) for text in texts)  # a Row would show long values cut short
            }


RunGateway = Callable[..., Awaitable[Gateway]]
RunReplica = Callable[..., Awaitable[FakeReplica]]


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / BASE)


@pytest.fixture(scope="session")
def base(base_folder: Path) -> BaseModel:
    return BaseModel.read(base_folder)


@pytest.fixture
async def run_replica(base: BaseModel) -> AsyncIterator[RunReplica]:
    """Starts fake replicas; at the end each must have seen nothing that would hurt a real engine."""
    running: list[FakeReplica] = []

    async def run(**options: Any) -> FakeReplica:
        replica = FakeReplica(base.fingerprint, base_name=BASE, **options)
        await replica.start()
        running.append(replica)
        return replica

    yield run
    for replica in running:
        await replica.stop()
        assert replica.violations == []


@pytest.fixture
async def replica(run_replica: RunReplica) -> FakeReplica:
    return await run_replica()


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[Gateway]:
    """The gateway as it runs in production: uvicorn on a socket of its own."""
    app = create_app(settings)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # as uvloop has it; without, 40 ms a request
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=FrontProtocol,
            log_config=None,
            access_log=False,
            lifespan="on",
            timeout_graceful_shutdown=1,
            proxy_headers=False,
        )
    )
    task = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started:
        assert not task.done(), task.exception()
        await asyncio.sleep(0.01)
    home = Home(settings.home)
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    gateway = Gateway(url, app.parts, plain_client(), home, app)
    gateway.operator = gateway.client(home.operator_key())
    try:
        yield gateway
    finally:
        for client in gateway.clients:
            await client.aclose()
        server.should_exit = True
        await task


@pytest.fixture
async def run_gateway(tmp_path: Path, base_folder: Path) -> AsyncIterator[RunGateway]:
    """Starts gateways in front of the replicas given; settings may be overridden."""
    async with asyncio.TaskGroup() as group:
        stops: list[asyncio.Event] = []

        async def hold(settings: Settings, started: asyncio.Future[Gateway], stop: asyncio.Event) -> None:
            try:
                async with serving(settings) as gateway:
                    started.set_result(gateway)
                    await stop.wait()
            except Exception as error:
                if started.done():
                    raise
                started.set_exception(error)

        async def run(*replicas: FakeReplica, **overrides: Any) -> Gateway:
            given = {
                "home": tmp_path / "home",
                "base_model": str(base_folder),
                "replicas": tuple(replica.url for replica in replicas),
                "replica_token": SecretStr(TOKEN),
                "operator_port": 0,
                "probe_interval_s": 0.1,
                "probe_deadline_s": 10.0,  # a test in which an engine freezes says another; a stall is none
                "proof": "off",  # its loads and requests would be counted among those that tests make
                "proof_delay_s": 0,
                **overrides,
            }
            started: asyncio.Future[Gateway] = asyncio.get_running_loop().create_future()
            stop = asyncio.Event()
            stops.append(stop)
            group.create_task(hold(Settings(_env_file=None, **given), started, stop))
            gateway = await started
            if replicas:
                await until_ready(gateway)
            return gateway

        yield run
        for stop in stops:
            stop.set()


async def until_ready(gateway: Gateway, deadline_s: float = 10) -> None:
    async with asyncio.timeout(deadline_s):
        while (await gateway.operator.get("/ready")).status_code != 200:
            await asyncio.sleep(0.02)


@pytest.fixture
async def gateway(run_gateway: RunGateway, replica: FakeReplica) -> Gateway:
    return await run_gateway(replica)


@pytest.fixture
async def acme(gateway: Gateway) -> Tenant:
    return await gateway.tenant("acme")


@pytest.fixture
async def globex(gateway: Gateway) -> Tenant:
    return await gateway.tenant("globex")


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return write_good(tmp_path / "good", seed=1)


@pytest.fixture
def other_good(tmp_path: Path) -> Path:
    return write_good(tmp_path / "other-good", seed=2)


def live_routes(front: Front) -> set[tuple[str, str]]:
    """Method and path of everything that this gateway answers, as it was put together."""
    control = front._app._app  # type: ignore[attr-defined]  # FastAPI, under the counting of its requests
    found = {(method, route.path) for route in control.routes for method in route.methods}
    return found | {("POST", path.decode()) for path in front.hot}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error object; every error has exactly OpenAI's members (and `faults` where an adapter was refused)."""
    error: dict[str, Any] = response.json()["error"]
    assert set(error) - {"faults"} == {"message", "type", "param", "code"}
    return error
