"""Gateways as processes: several on a port, restarted under load, drained, killed. Real sockets, real signals."""

import asyncio
import json
import os
import signal
import socket
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter_store.base_model import BaseModel
from loadtests.fake.replica import FakeReplica
from tests.bad_adapters import write_base
from tests.gateways import (
    GatewayProcess,
    Load,
    chat,
    gateway_settings,
    is_whole,
    new_key,
    stream,
    until_ready,
)
from tests.ports import free_port
from tests.servers import redis_server
from tests.waiting import is_gone, until

MODEL = "base"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("models") / MODEL)


@pytest.fixture
async def replica(base: Path) -> AsyncIterator[FakeReplica]:
    fake = FakeReplica(BaseModel.read(base).fingerprint, base_name=MODEL)
    await fake.start()
    yield fake
    await fake.stop()


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with redis_server() as server:
        yield server.url


NewGateway = Callable[..., GatewayProcess]


@pytest.fixture
async def new_gateway(base: Path, replica: FakeReplica, tmp_path: Path) -> AsyncIterator[NewGateway]:
    """Gateways on one home, not yet started; none outlives the test."""
    made: list[GatewayProcess] = []

    def new(port: int | None = None, **settings: str) -> GatewayProcess:
        log = tmp_path / f"gateway-{len(made)}.log"
        given = gateway_settings(base, replica, **{f"TAILOR_{name.upper()}": value for name, value in settings.items()})
        made.append(GatewayProcess(port or free_port(), tmp_path / "home", given, log))
        return made[-1]

    yield new
    for gateway in made:
        await gateway.kill()


async def started(gateway: GatewayProcess) -> GatewayProcess:
    await gateway.start()
    await gateway.serves()
    await until_ready(gateway.url)
    return gateway


async def test_gateways_on_one_port_are_restarted_without_a_failed_request(new_gateway: NewGateway) -> None:
    """F7: the new one starts beside the old one, which is stopped under load; running streams end whole."""
    old = await started(new_gateway(reuse_port="true"))
    key = await new_key(old.url, old.operator_key())
    other = new_gateway(old.port, reuse_port="true")
    async with Load([old.url], key, MODEL).running() as load:
        await load.more()
        for leaving, coming in ((old, other), (other, new_gateway(old.port, reuse_port="true"))):
            await coming.start()
            await coming.serves()
            await load.more()
            leaving.signal(signal.SIGTERM)
            await leaving.ended()
            await load.more()
    assert load.failures == []


async def test_gateways_on_two_ports_are_restarted_without_a_failed_request(new_gateway: NewGateway) -> None:
    """F7 behind a balancer that goes elsewhere where nobody listens, and never sends a request twice."""
    both = [await started(new_gateway()), await started(new_gateway())]
    key = await new_key(both[0].url, both[0].operator_key())
    async with Load([gateway.url for gateway in both], key, MODEL).running() as load:
        await load.more()
        for number in (0, 1):
            both[number].signal(signal.SIGTERM)
            await both[number].ended()
            await load.more()
            both[number] = await started(new_gateway(both[number].port))
            await load.more()
    assert load.failures == []


async def test_workers_are_replaced_one_by_one_without_a_failed_request(
    new_gateway: NewGateway, redis_url: str
) -> None:
    """SIGHUP to the parent: every worker is another process afterwards, on the same sockets."""
    gateway = await started(new_gateway(workers="2", redis_url=redis_url))
    key = await new_key(gateway.url, gateway.operator_key())
    await until(lambda: len(gateway.children()) == 2 and gateway.said("Application startup complete") == 2)
    before = gateway.children()
    async with Load([gateway.url], key, MODEL).running() as load:
        await load.more()
        gateway.signal(signal.SIGHUP)
        await until(lambda: len(gateway.children()) == 2 and not set(before) & set(gateway.children()))
        await load.more()
    assert load.failures == []
    assert gateway.said("Finished server process") == 2
    await gateway.stop()


async def test_a_worker_that_is_killed_comes_back_and_its_queue_waits_for_it(
    new_gateway: NewGateway, redis_url: str
) -> None:
    """kill -9: connections that the kernel has given to its socket are served by the next one."""
    gateway = await started(new_gateway(workers="2", redis_url=redis_url))
    await until(lambda: gateway.said("Application startup complete") == 2)
    victim = gateway.children()[0]
    os.kill(victim, signal.SIGSTOP)  # so that connections gather in its queue
    with ExitStack() as held:
        clients = [held.enter_context(socket.create_connection(("127.0.0.1", gateway.port))) for _ in range(16)]
        for client in clients:
            client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        os.kill(victim, signal.SIGKILL)
        answers = [await asyncio.to_thread(read_all, client) for client in clients]
    assert [answer[:15] for answer in answers] == [b"HTTP/1.1 200 OK"] * 16
    assert victim not in gateway.children()
    await gateway.stop()


async def test_workers_end_with_their_parent(new_gateway: NewGateway, redis_url: str) -> None:
    """Whether it is told to stop or killed, no worker stays, and the port is free."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        gateway = await started(new_gateway(workers="2", redis_url=redis_url))
        workers = gateway.children()
        gateway.signal(number)
        await gateway.ended()
        await until(lambda pids=workers: all(map(is_gone, pids)))  # type: ignore[misc]
        with socket.create_server(("127.0.0.1", gateway.port)):
            pass


async def test_a_port_on_which_somebody_listens_is_not_shared_by_accident(
    new_gateway: NewGateway, redis_url: str
) -> None:
    """Workers share their port with each other; another process that shares it too would take tenants' requests."""
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        gateway = new_gateway(stranger.getsockname()[1], workers="2", redis_url=redis_url)
        await gateway.start()
        assert await gateway.ended() == 1
        assert gateway.log.read_text().count("is in use") == 1


async def test_a_fault_of_all_workers_is_told_once(new_gateway: NewGateway, redis_url: str, tmp_path: Path) -> None:
    """And the parent ends with it."""
    empty = tmp_path / "empty"
    empty.mkdir()
    gateway = new_gateway(workers="2", redis_url=redis_url, base_model=str(empty))
    await gateway.start()
    assert await gateway.ended() == 1
    assert gateway.said("config.json") == 1


@pytest.mark.local
async def test_gateways_that_start_at_once_make_one_operator_key(new_gateway: NewGateway) -> None:
    """On an empty home: one key in the database, the one in the file, and the same secrets for both."""
    both = [new_gateway(), new_gateway()]
    await asyncio.gather(*(gateway.start() for gateway in both))
    for gateway in both:
        await gateway.serves()
    with sqlite3.connect(both[0].home / "tailor.db") as database:
        assert database.execute("SELECT count(*) FROM api_keys").fetchone() == (1,)
    database.close()
    for gateway in both:
        headers = {"authorization": f"Bearer {gateway.operator_key()}"}
        async with httpx.AsyncClient(base_url=gateway.url, headers=headers) as client:
            assert (await client.get("/admin/v1/tenants")).status_code == 200


async def test_a_stream_gets_its_time_and_then_a_well_formed_end(new_gateway: NewGateway, replica: FakeReplica) -> None:
    """F7: what ends within TAILOR_DRAIN_S is whole; what does not ends in an error event."""
    gateway = await started(new_gateway(drain_s="10"))
    key = await new_key(gateway.url, gateway.operator_key())
    replica.faults.event_delay_s = 60
    long = await begun_stream(gateway.url, key)
    replica.faults.event_delay_s = 0.3  # of each event from now on
    short = await begun_stream(gateway.url, key)
    gateway.signal(signal.SIGTERM)
    assert is_whole(await short)
    events = await long
    assert json.loads(events[-1])["error"]["code"] == "server_restarting"
    await gateway.ended()


async def test_an_idle_connection_gets_one_more_answer(new_gateway: NewGateway) -> None:
    """Its client cannot know that the server ends; it learns it from `connection: close`. One that stays silent is
    closed, long before the time for draining is over."""
    gateway = await started(new_gateway(drain_s="120"))
    key = await new_key(gateway.url, gateway.operator_key())
    headers = {"authorization": f"Bearer {key}"}
    with socket.create_connection(("127.0.0.1", gateway.port)) as silent:
        async with httpx.AsyncClient(base_url=gateway.url, headers=headers) as client:
            first = await client.post("/v1/chat/completions", json=chat(MODEL))
            assert first.headers.get("connection") != "close"
            gateway.signal(signal.SIGTERM)
            await until(lambda: refuses(gateway.port))
            async with asyncio.timeout(10):  # connections that are there learn it a tenth of a second later
                while (last := await client.post("/v1/chat/completions", json=chat(MODEL))).headers.get(
                    "connection"
                ) is None:
                    assert last.status_code == 200
            assert (last.status_code, last.headers["connection"]) == (200, "close")
        assert await asyncio.to_thread(read_all, silent) == b""
    await gateway.ended(30)


async def test_a_drain_is_announced_before_it_begins(new_gateway: NewGateway) -> None:
    """For TAILOR_DRAIN_NOTICE_S `/ready` is 503, so that balancers go elsewhere, and all else goes on."""
    gateway = await started(new_gateway(drain_notice_s="5"))
    key = await new_key(gateway.url, gateway.operator_key())
    async with httpx.AsyncClient(base_url=gateway.url, headers={"authorization": f"Bearer {key}"}) as client:
        gateway.signal(signal.SIGTERM)
        ready: dict[str, Any] = {"draining": False}
        while not ready["draining"]:
            answer = await client.get("/ready")
            ready = answer.json()
        assert answer.status_code == 503
    async with httpx.AsyncClient(base_url=gateway.url, headers={"authorization": f"Bearer {key}"}) as newcomer:
        assert (await newcomer.post("/v1/chat/completions", json=chat(MODEL))).status_code == 200
    await gateway.ended()


async def begun_stream(url: str, key: str) -> "asyncio.Task[list[str]]":
    begun = asyncio.Event()
    task = asyncio.create_task(stream(url, key, MODEL, begun))
    async with asyncio.timeout(20):
        await begun.wait()
    return task


def refuses(port: int) -> bool:
    with socket.socket() as knock:
        knock.settimeout(0.05)  # while it lets nobody in, a knock is not even refused
        return knock.connect_ex(("127.0.0.1", port)) == 111


def read_all(client: socket.socket) -> bytes:
    client.settimeout(60)
    answer = b""
    while piece := client.recv(65_536):
        answer += piece
    return answer
