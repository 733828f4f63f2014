"""A gateway that is killed in the middle of an upload in parts: what it has acknowledged is there when it is back.

The ordinary run kills it 2 times, `-m full` 12 times.
"""

import asyncio
import random
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapter_store.bundle import BUNDLE_FILES
from tests.bad_adapters import write_base, write_good
from tests.gateways import GatewayProcess, gateway_settings, new_key
from tests.ports import free_port

PART_BYTES = 1_024


class Sender:
    """Sends what is missing, remembers what was acknowledged."""

    def __init__(self, url: str, key: str, folder: Path) -> None:
        self.client = httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=30)
        self.files = {name: (folder / name).read_bytes() for name in BUNDLE_FILES}
        self.acknowledged: set[tuple[str, int]] = set()
        self.place = ""

    async def create(self) -> None:
        told = [{"name": n, "bytes": len(d), "sha256": sha256(d).hexdigest()} for n, d in self.files.items()]
        made = await self.client.post("/v1/adapters/bot/uploads", json={"files": told})
        self.place = f"/v1/adapters/bot/uploads/{made.json()['id']}"

    async def missing(self) -> list[tuple[str, int]]:
        state: dict[str, Any] = (await self.client.get(self.place)).json()
        return [(file["name"], number) for file in state["files"] for number in file["missing"]]

    async def send(self, parts: list[tuple[str, int]]) -> None:
        for name, number in parts:
            data = self.files[name][(number - 1) * PART_BYTES : number * PART_BYTES]
            headers = {"x-content-sha256": sha256(data).hexdigest()}
            answer = await self.client.put(f"{self.place}/{name}/{number}", content=data, headers=headers)
            assert answer.status_code == 200, answer.text
            self.acknowledged.add((name, number))


async def kill_and_go_on(tmp_path: Path, kills: int) -> None:
    settings = gateway_settings(write_base(tmp_path / "base"), TAILOR_UPLOAD_PART_BYTES=str(PART_BYTES))
    gateway = GatewayProcess(free_port(), tmp_path / "home", settings, tmp_path / "log")
    chance = random.Random(7)
    await gateway.start()
    try:
        await gateway.serves()
        sender = Sender(gateway.url, await new_key(gateway.url, gateway.operator_key()), write_good(tmp_path / "good"))
        await sender.create()
        killed = 0
        while missing := await sender.missing():
            assert not sender.acknowledged & set(missing)
            if killed == kills:
                await sender.send(missing)
                continue
            enough = len(sender.acknowledged) + max(1, len(missing) // (kills - killed + 2))
            sending = asyncio.create_task(sender.send(missing))
            while len(sender.acknowledged) < enough and not sending.done():
                await asyncio.sleep(0.001)
            await asyncio.sleep(chance.uniform(0, 0.02))  # somewhere inside a part
            await gateway.kill()
            with suppress(httpx.TransportError):
                await sending
            killed += 1
            gateway.log.write_text("")
            await gateway.start()
            await gateway.serves()
        answers = [await sender.client.post(f"{sender.place}/complete") for _ in range(2)]
        assert [answer.status_code for answer in answers] == [201, 201], answers[0].text
        assert answers[0].content == answers[1].content
        assert killed == kills
        left = [path for path in (gateway.home / "staging").rglob("*") if path.is_file()]
        assert left == []
        await sender.client.aclose()
    finally:
        await gateway.stop()


@pytest.mark.timeout(180)
async def test_acknowledged_parts_survive_a_kill(tmp_path: Path) -> None:
    """Twice, at points that chance gives."""
    await kill_and_go_on(tmp_path, kills=2)


@pytest.mark.full
@pytest.mark.timeout(1_800)
async def test_acknowledged_parts_survive_many_kills(tmp_path: Path) -> None:
    """Twelve times; the adapter has some more parts than that."""
    await kill_and_go_on(tmp_path, kills=12)
