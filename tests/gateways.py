"""Gateways as processes of their own, and clients that ask them without pause and count what fails."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from loadtests.fake.replica import TOKEN, FakeReplica
from tests.ports import free_port
from tests.storage import clean_environment

START_S = 60.0


def plain_client(**options: Any) -> httpx.AsyncClient:
    """A client for `http://`: to read the system's certificates would take 20 ms of each."""
    return httpx.AsyncClient(verify=False, **options)


@dataclass
class GatewayProcess:
    """`python -m gateway.server` with settings of its own."""

    port: int
    home: Path
    settings: dict[str, str]
    log: Path
    process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def children(self) -> list[int]:
        """Its workers."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError, ValueError):
                status = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(status[1]) == self.pid and status[0] != "Z":
                    found.append(int(entry.name))
        return sorted(found)

    async def start(self) -> None:
        own = {"TAILOR_PORT": str(self.port), "TAILOR_HOME": str(self.home)}
        with self.log.open("ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "gateway.server",
                env={**clean_environment(), **self.settings, **own},
                stdout=log,
                stderr=log,
            )

    async def serves(self) -> None:
        """Return once it has said that it serves; on a shared port an answer could be another's."""
        async with asyncio.timeout(START_S):
            while not self.said("Application startup complete"):
                assert self.process is not None
                assert self.process.returncode is None, self.log.read_text()
                await asyncio.sleep(0.05)

    def said(self, text: str) -> int:
        """How often the log has it."""
        return self.log.read_text().count(text)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    async def ended(self, deadline_s: float = 60) -> int:
        assert self.process is not None
        async with asyncio.timeout(deadline_s):
            return await self.process.wait()

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()
            await self.ended()

    async def kill(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.ended()

    def operator_key(self) -> str:
        return (self.home / "operator-key").read_text().strip()


def gateway_settings(base: Path, *replicas: FakeReplica, **more: str) -> dict[str, str]:
    return {
        "TAILOR_BASE_MODEL": str(base),
        "TAILOR_REPLICAS": ",".join(replica.url for replica in replicas),
        "TAILOR_REPLICA_TOKEN": TOKEN,
        "TAILOR_OPERATOR_PORT": "0",
        "TAILOR_PROBE_INTERVAL_S": "0.1",
        "TAILOR_PROOF": "off",  # as in tests/integration/gateway
        **more,
    }


async def until_ready(url: str) -> None:
    async with asyncio.timeout(START_S), plain_client() as client:
        while True:
            with suppress(httpx.TransportError):
                if (await client.get(f"{url}/ready")).status_code == 200:
                    return
            await asyncio.sleep(0.05)


@asynccontextmanager
async def gateway_process(
    base: Path, replica: FakeReplica, folder: Path, **settings: str
) -> AsyncIterator[GatewayProcess]:
    """One that is ready, in a new folder."""
    folder.mkdir()
    gateway = GatewayProcess(free_port(), folder / "home", gateway_settings(base, replica, **settings), folder / "log")
    await gateway.start()
    try:
        await gateway.serves()
        await until_ready(gateway.url)
        yield gateway
    finally:
        await gateway.kill()


async def new_key(url: str, operator_key: str, tenant: str = "acme") -> str:
    """A tenant's key."""
    headers = {"authorization": f"Bearer {operator_key}"}
    async with plain_client(base_url=url, headers=headers) as client:
        assert (await client.post("/admin/v1/tenants", json={"name": tenant})).status_code == 201
        made = await client.post(f"/admin/v1/tenants/{tenant}/keys", json={})
    secret: str = made.json()["secret"]
    return secret


@dataclass
class Load:
    """Clients that ask without pause: some keep their connection, some open one for each request."""

    urls: Sequence[str]
    key: str
    model: str
    answered: int = 0
    failures: list[str] = field(default_factory=list)
    _enough: asyncio.Event = field(default_factory=asyncio.Event)

    @asynccontextmanager
    async def running(self, *, keeping: int = 4, opening: int = 4) -> AsyncIterator["Load"]:
        """Ask until the block ends."""
        async with asyncio.TaskGroup() as group:
            for number in range(keeping + opening):
                group.create_task(self._ask(number, keeps=number < keeping))
            try:
                yield self
            finally:
                self._enough.set()

    async def more(self, count: int = 40) -> None:
        """Return after so many further requests."""
        wanted = self.answered + count
        async with asyncio.timeout(60):
            while self.answered < wanted and not self.failures:
                await asyncio.sleep(0.02)

    async def _ask(self, number: int, *, keeps: bool) -> None:
        limits = httpx.Limits(max_keepalive_connections=1 if keeps else 0)
        headers = {"authorization": f"Bearer {self.key}"}
        async with plain_client(headers=headers, limits=limits, timeout=30) as client:
            while not self._enough.is_set():
                try:
                    status, text = await self._once(client, number)
                except (httpx.HTTPError, ValueError) as error:
                    self.failures.append(repr(error))
                    continue
                if status != 200:
                    self.failures.append(f"{status} {text}")
                self.answered += 1
                await asyncio.sleep(0.01)

    async def _once(self, client: httpx.AsyncClient, number: int) -> tuple[int, str]:
        """As a balancer does it: a port where nobody listens is tried once, then the next one's turn comes."""
        first = number + self.answered
        for attempt in range(len(self.urls) + 1):
            url = self.urls[(first + attempt) % len(self.urls)]
            try:
                answer = await client.post(f"{url}/v1/chat/completions", json=chat(self.model))
            except httpx.ConnectError:
                if attempt == len(self.urls):
                    raise
            else:
                return answer.status_code, answer.text
        raise AssertionError


def chat(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": "who are you?"}], **more}


async def stream(url: str, key: str, model: str, begun: asyncio.Event | None = None) -> list[str]:
    """The data of every event of one streamed answer; `begun` is set at the first."""
    headers = {"authorization": f"Bearer {key}"}
    events: list[str] = []
    async with (
        plain_client(headers=headers, timeout=60) as client,
        client.stream("POST", f"{url}/v1/chat/completions", json=chat(model, stream=True)) as answer,
    ):
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                events.append(line.removeprefix("data: "))
                if begun is not None:
                    begun.set()
    return events


def is_whole(events: Sequence[str]) -> bool:
    return events[-1] == "[DONE]" and not any("error" in json.loads(event) for event in events[:-1])
