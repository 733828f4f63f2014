"""U1: hostile uploads at a gateway of its own process, over HTTP. It neither dies nor fails, and nothing is left.

The ordinary run sends 300 archives and forms, 300 safetensors files, 150 configs and 34 uploads in parts; `-m full`
10,000, 10,000, 5,000 and 1,000.
"""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import httpx
import psutil
import pytest

from tests.bad_adapters import write_base, write_good
from tests.gateways import GatewayProcess, gateway_settings, new_key
from tests.hostile_uploads import (
    ESCAPE,
    PART_BYTES,
    Good,
    InParts,
    Part,
    Upload,
    hostile_archive,
    hostile_config,
    hostile_parts,
    hostile_weights,
    two_files,
)
from tests.ports import free_port

LIMIT_BYTES = 4 << 20
MOST_CPU_S = 2.0
MOST_GROWTH_BYTES = 64 << 20
SETTLED = 100  # after so many, or half of what is sent, the process has its size
LEAVES_S = 10.0  # a gateway's time to find out that a client has gone
UPLOADS = "/v1/adapters/bot/uploads"


@dataclass
class Siege:
    """A gateway, what it is sent, and what that has cost."""

    gateway: GatewayProcess
    root: Path
    client: httpx.AsyncClient
    stranger: httpx.AsyncClient
    operator: httpx.AsyncClient
    good: Good
    statuses: Counter[int] = field(default_factory=Counter)
    sent: int = 0
    dearest: tuple[float, str] = (0.0, "")
    settles: int = SETTLED
    settled_bytes: int = 0
    peak_bytes: int = 0
    known: list[psutil.Process] = field(default_factory=list)

    def processes(self) -> list[psutil.Process]:
        """The gateway and its inspection worker; looked up once, for that takes longer than an upload."""
        if not self.known:
            gateway = psutil.Process(self.gateway.pid)
            self.known = [gateway, *gateway.children()]
        return self.known

    def cpu_s(self) -> float:
        return sum(used.user + used.system for used in (process.cpu_times() for process in self.processes()))

    def memory_bytes(self) -> int:
        return sum(int(process.memory_info().rss) for process in self.processes())

    async def send(self, seed: int, upload: Upload) -> None:
        before = self.cpu_s()
        headers = {"content-type": upload.content_type}
        told = f"seed {seed}, {upload.way}"
        self.note(await self.client.post("/v1/adapters/bot/versions", content=upload.body, headers=headers), told)
        self.end(before, told)

    def note(self, answer: httpx.Response, told: str) -> httpx.Response:
        assert 200 <= answer.status_code < 300 or 400 <= answer.status_code < 500, (
            f"{told}: {answer.status_code} {answer.text}"
        )
        assert "inspection_failed" not in answer.text, told
        self.statuses[answer.status_code] += 1
        return answer

    def end(self, cpu_before_s: float, told: str) -> None:
        """One upload is over."""
        self.dearest = max(self.dearest, (self.cpu_s() - cpu_before_s, told))
        self.sent += 1
        if self.sent % 25 == 0 or self.sent == self.settles:
            self.look()

    async def send_in_parts(self, seed: int, upload: InParts) -> None:
        before, told = self.cpu_s(), f"seed {seed}, {upload.way}"
        declared, kind = json.dumps(upload.declared), {"content-type": "application/json"}  # surrogates too
        made = self.note(await self.client.post(UPLOADS, content=declared, headers=kind), told)
        if made.status_code == 201:
            place = f"{UPLOADS}/{made.json()['id']}"
            await self._send_parts(place, upload, told)
            over = await self.client.delete(place)
            assert over.status_code in (204, 404), told
            await self._nothing_left(told)
        self.end(before, told)

    async def _send_parts(self, place: str, upload: InParts, told: str) -> None:
        sender = self.stranger if upload.by_stranger else self.client
        before = (await self.client.get(place)).json()
        noted = []
        for parts in upload.rounds:
            answers = await asyncio.gather(*(put(sender, place, part) for part in parts))
            noted += [self.note(answer, told) for answer in answers if answer is not None]
        if upload.starved:
            await self._limit_bytes(1)
        calls = {
            "complete": ("POST", f"{place}/complete"),
            "cancel": ("DELETE", place),
            "show": ("GET", place),
            "list": ("GET", UPLOADS),
        }
        ended = await asyncio.gather(*(sender.request(*calls[call]) for call in upload.ending))
        noted += [self.note(answer, told) for answer in ended]
        if upload.starved:
            assert {answer.status_code for answer in ended} == {403}, told
            await self._limit_bytes(None)
        if upload.by_stranger:
            assert {answer.status_code for answer in noted[:-1]} == {404}, told
            assert noted[-1].json()["data"] == []
            assert (await self.client.get(place)).json() == before

    async def _limit_bytes(self, most: int | None) -> None:
        changed = await self.operator.patch("/admin/v1/plans/default", json={"max_stored_bytes": most})
        assert changed.status_code == 200, changed.text

    async def _nothing_left(self, told: str) -> None:
        """A client that has gone is found out by and by."""
        until = time.monotonic() + LEAVES_S
        while files(self.gateway.home / "staging") + files(self.gateway.home / "blobs" / "uploads"):
            assert time.monotonic() < until, told
            await asyncio.sleep(0.01)

    def look(self) -> None:
        """Nothing staged stays, and memory does not grow."""
        assert files(self.gateway.home / "staging") == []
        now = self.memory_bytes()
        if self.sent <= self.settles:
            self.settled_bytes = now
        self.peak_bytes = max(self.peak_bytes, now)

    def escaped(self) -> list[Path]:
        """Files that an upload's names tried to be."""
        near = [self.root, *self.root.parents, Path.cwd(), Path.home()]
        found = [path for place in near for path in place.glob(f"*{ESCAPE}*")]
        return found + list(self.root.rglob(f"*{ESCAPE}*"))

    async def none_harmed(self) -> None:
        """What must be so when all is over; the adapter that took in harmless mutations is deleted first."""
        before, self.known = self.known, []
        assert before == self.processes()  # nobody died and was replaced
        good = two_files(self.good.config, self.good.weights, "")
        headers = {"content-type": good.content_type}
        taken = await self.client.post("/v1/adapters/bot/versions", content=good.body, headers=headers)
        assert taken.status_code == 201, taken.text
        gone = await self.client.delete("/v1/adapters/bot", params={"force": True})
        assert gone.status_code in (200, 202), gone.text
        self.look()
        assert files(self.gateway.home / "blobs") == []
        assert self.escaped() == []
        assert "Traceback" not in self.gateway.log.read_text()
        assert self.dearest[0] <= MOST_CPU_S, self.dearest
        assert self.peak_bytes - self.settled_bytes <= MOST_GROWTH_BYTES


async def put(client: httpx.AsyncClient, place: str, part: Part) -> httpx.Response | None:
    """The answer; None to a part that was broken off."""

    async def body() -> AsyncIterator[bytes]:
        yield part.body[: len(part.body) // 2]
        raise ConnectionAbortedError

    path = f"{place}/{quote(part.file, safe='')}/{quote(part.number, safe='')}"
    headers = {"x-content-sha256": part.checksum}
    if not part.is_cut:
        return await client.put(path, content=part.body, headers=headers)
    with suppress(ConnectionAbortedError):
        await client.put(path, content=body(), headers={**headers, "content-length": str(len(part.body))})
    return None


def files(place: Path) -> list[Path]:
    return [path for path in place.rglob("*") if path.is_file()] if place.exists() else []


def client_of(gateway: GatewayProcess, key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=gateway.url, headers={"authorization": f"Bearer {key}"}, timeout=60)


@pytest.fixture
async def siege(tmp_path: Path) -> AsyncIterator[Siege]:
    base = write_base(tmp_path / "base")
    good = Good.read(write_good(tmp_path / "good"))
    home = tmp_path / "deep" / "down" / "home"
    home.parent.mkdir(parents=True)
    settings = gateway_settings(
        base, TAILOR_MAX_ADAPTER_BYTES=str(LIMIT_BYTES), TAILOR_UPLOAD_PART_BYTES=str(PART_BYTES)
    )
    gateway = GatewayProcess(free_port(), home, settings, tmp_path / "gateway.log")
    await gateway.start()
    try:
        await gateway.serves()
        operator = gateway.operator_key()
        keys = [await new_key(gateway.url, operator), await new_key(gateway.url, operator, "globex"), operator]
        async with AsyncExitStack() as opened:
            client, stranger, master = [await opened.enter_async_context(client_of(gateway, key)) for key in keys]
            yield Siege(gateway, tmp_path, client, stranger, master, good)
    finally:
        await gateway.stop()


async def besiege(siege: Siege, make: Callable[[int, Good], Upload | InParts], count: int) -> None:
    await siege.send(-1, two_files(siege.good.config, siege.good.weights, "the good one"))
    assert siege.statuses == {201: 1}
    siege.known = []  # the worker began with that one
    siege.settles = min(SETTLED, 1 + count // 2)
    spent = siege.cpu_s()
    begin = time.monotonic()
    for seed in range(count):
        upload = make(seed, siege.good)
        await (siege.send(seed, upload) if isinstance(upload, Upload) else siege.send_in_parts(seed, upload))
    spent = siege.cpu_s() - spent
    await siege.none_harmed()
    grown = (siege.peak_bytes - siege.settled_bytes) >> 20
    print(  # noqa: T201  the figures of the run
        f"{make.__name__}: {count} in {time.monotonic() - begin:.0f} s, {spent:.0f} s of CPU, {dict(siege.statuses)}; "
        f"dearest {siege.dearest[0]:.2f} s of CPU ({siege.dearest[1]}); memory grew {grown} MiB"
    )
    assert siege.sent == count + 1
    assert siege.statuses[201] < sum(siege.statuses.values()) / 2
    assert len(siege.statuses) >= 3


async def test_hostile_archives_and_forms_do_no_harm(siege: Siege) -> None:
    """300 archives and forms: names that climb, links, duplicates, bombs, lying sizes, mutations, noise."""
    await besiege(siege, hostile_archive, 300)


async def test_hostile_weights_do_no_harm(siege: Siege) -> None:
    """300 safetensors files: truncated, mutated, with headers that lie or are dear to parse."""
    await besiege(siege, hostile_weights, 300)


async def test_hostile_configs_do_no_harm(siege: Siege) -> None:
    """150 configs: deep, huge, with regular expressions, odd values and literals."""
    await besiege(siege, hostile_config, 150)


async def test_hostile_uploads_in_parts_do_no_harm(siege: Siege) -> None:
    """34, two of each way: parts that lie, crowd, break off, are a stranger's, or make up a hostile adapter."""
    await besiege(siege, hostile_parts, 34)
    assert {200, 201, 204, 400, 403, 404, 409, 413, 422} <= set(siege.statuses)


@pytest.mark.full
@pytest.mark.timeout(7_200)
@pytest.mark.parametrize(
    ("make", "count"),
    [(hostile_archive, 10_000), (hostile_weights, 10_000), (hostile_config, 5_000), (hostile_parts, 1_000)],
)
async def test_twenty_six_thousand_hostile_uploads(
    siege: Siege, make: Callable[[int, Good], Upload | InParts], count: int
) -> None:
    """U1's figures."""
    await besiege(siege, make, count)
