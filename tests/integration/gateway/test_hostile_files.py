"""Hostile training files at a gateway of its own process: it neither dies nor fails, and nothing is left or grows.

The ordinary run sends 60 files; `-m full` 5,000.
"""

import json
import random
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.bad_adapters import write_base
from tests.bench.uploads import PeakMemory
from tests.gateways import GatewayProcess, gateway_settings, new_key
from tests.hostile_uploads import ESCAPE, HOSTILE_NAMES, MULTIPART, form, mutated
from tests.integration.gateway.test_files import jsonl
from tests.integration.gateway.test_hostile_uploads import client_of, files
from tests.ports import free_port
from tests.storage import settings_at

MOST_CPU_S = 2.0
MOST_GROWTH_BYTES = 32 << 20
SETTLED = 30  # after so many the process has its size
LARGE_BYTES = 24 << 20
MOST_EXTRA_BYTES = {"file": 12 << 20, "s3": 32 << 20}
"""By the kind of storage: two parts of 5 MiB travel to a bucket at once, each with its copies; U4 allows 32."""
LIMIT_BYTES = 64 << 20


@dataclass
class Besieged:
    """A gateway, and what it has been sent."""

    gateway: GatewayProcess
    client: httpx.AsyncClient

    def cpu_s(self) -> float:
        """Of the gateway, and of checks that have ended."""
        used = psutil.Process(self.gateway.pid).cpu_times()
        return float(used.user + used.system + used.children_user + used.children_system)

    def memory_bytes(self) -> int:
        return int(psutil.Process(self.gateway.pid).memory_info().rss)

    def left(self) -> list[Path]:
        return files(self.gateway.home / "staging") + files(self.gateway.home / "blobs")


@pytest.fixture
async def besieged(tmp_path: Path) -> AsyncIterator[Besieged]:
    settings = gateway_settings(write_base(tmp_path / "base"), TAILOR_MAX_FILE_BYTES=str(LIMIT_BYTES))
    gateway = GatewayProcess(free_port(), tmp_path / "deep" / "down" / "home", settings, tmp_path / "gateway.log")
    gateway.home.parent.mkdir(parents=True)
    await gateway.start()
    try:
        await gateway.serves()
        async with client_of(gateway, await new_key(gateway.url, gateway.operator_key())) as client:
            yield Besieged(gateway, client)
    finally:
        await gateway.stop()


def hostile_line(draw: random.Random) -> bytes:
    """A line that is no example, or one that is dear to read."""
    said: Any = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "a dragon"}]
    match draw.randrange(12):
        case 0:
            return b"[" * draw.choice([10, 100_000])
        case 1:
            return b'{"messages":' * 5_000
        case 2:
            return b'{"messages": "' + b"a" * draw.choice([100, 2 << 20]) + b'"}'
        case 3:
            return b'{"messages": [' + b"1," * draw.choice([10, 500_000]) + b"1]}"
        case 4:
            return (
                json.dumps({"messages": said}).encode().replace(b"who", draw.choice([b"\xff\xfe", b"\0", b"\\ud800"]))
            )
        case 5:
            return json.dumps(
                {"messages": [{**said[0], draw.choice(["weight", "x", "role"]): draw.choice([1, None, []])}]}
            ).encode()
        case 6:
            return b'{"messages": ' + draw.choice([b"NaN", b"1e999", b"-0", b"9" * 5_000, b"null", b"true"]) + b"}"
        case 7:
            return json.dumps({"messages": said, "tools": [{"type": "function"}] * draw.choice([1, 10_000])}).encode()
        case 8:
            return json.dumps(
                {"input": {"messages": said[:1]}, "preferred_output": said, "non_preferred_output": 1}
            ).encode()
        case 9:
            return draw.randbytes(draw.choice([1, 1_000, 100_000]))
        case 10:
            return mutated(draw, json.dumps({"messages": said}).encode())
        case _:
            return b"\n" * draw.choice([1, 100_000])


def hostile_form(seed: int) -> tuple[bytes, str]:
    """A request's body, and its kind: odd lines, odd names, odd parts, or a mutated form."""
    draw = random.Random(seed)
    lines = [hostile_line(draw) for _ in range(draw.randint(1, 4))]
    data = draw.choice([jsonl(2), b""]) + draw.choice([b"\n", b"\r\n", b"\r"]).join(lines)
    names = [name.encode("unicode_escape").decode() for name in (*HOSTILE_NAMES, "train.jsonl")]
    parts = [('name="purpose"', b"fine-tune"), (f'name="file"; filename="{draw.choice(names)}"', data)]
    if draw.randrange(4) == 0:
        odd = draw.choice(
            ['name="purpose"', 'name="file"; filename="b"', 'name="x"', 'name="expires_after[seconds]"', ""]
        )
        parts.append((odd, draw.choice([b"fine-tune", b"batch", b"3600", b"-1", b"9" * 2_000])))
    draw.shuffle(parts)
    body = form(*parts)
    if draw.randrange(4) == 0:
        body = mutated(draw, body, within=400)
    return body, draw.choice([MULTIPART] * 8 + ["multipart/form-data", "application/json"])


async def besiege(besieged: Besieged, count: int) -> None:
    statuses: Counter[int] = Counter()
    dearest, settled = (0.0, -1), 0
    for seed in range(count):
        body, kind = hostile_form(seed)
        before = besieged.cpu_s()
        answer = await besieged.client.post("/v1/files", content=body, headers={"content-type": kind})
        dearest = max(dearest, (besieged.cpu_s() - before, seed))
        assert answer.status_code == 200 or 400 <= answer.status_code < 500, (seed, answer.text)
        assert "could not be checked" not in answer.text, seed
        statuses[answer.status_code] += 1
        if answer.status_code == 200:
            gone = await besieged.client.delete(f"/v1/files/{answer.json()['id']}")
            assert gone.status_code == 200, (seed, gone.text)
        assert besieged.left() == [], seed
        if seed == SETTLED:
            settled = besieged.memory_bytes()
    grown = besieged.memory_bytes() - settled
    print(f"{count}: {dict(statuses)}, dearest {dearest}, grown {grown >> 20} MiB")  # noqa: T201  the run's figures
    assert set(statuses) >= {200, 400}
    assert dearest[0] <= MOST_CPU_S, dearest
    assert grown <= MOST_GROWTH_BYTES
    assert "Traceback" not in besieged.gateway.log.read_text()
    home = besieged.gateway.home
    assert [path for place in (*home.parents[:3], Path.cwd()) for path in place.glob(f"*{ESCAPE}*")] == []


async def test_hostile_files_do_no_harm(besieged: Besieged) -> None:
    """60: at most 2 s of CPU each, the check's included, nothing left, and no growth."""
    await besiege(besieged, 60)


@pytest.mark.full
@pytest.mark.timeout(7_200)
async def test_five_thousand_hostile_files_do_no_harm(besieged: Besieged) -> None:
    """U1's measure, for files."""
    await besiege(besieged, 5_000)


async def test_a_large_file_is_never_in_memory(besieged: Besieged, tmp_path: Path) -> None:
    """24 MiB up and down: the gateway grows by 12 MiB at most, 32 with a bucket."""
    line = json.dumps(
        {"messages": [{"role": "user", "content": "a" * 1_000_000}, {"role": "assistant", "content": "b"}]}
    )
    data = tmp_path / "large.jsonl"
    with data.open("w") as file:
        for _ in range(LARGE_BYTES // len(line)):
            file.write(line + "\n")

    async def send(*, whole: bool) -> httpx.Response:
        with data.open("rb") as opened:
            more = {} if whole else {"expires_after[anchor]": "created_at"}
            form = {"purpose": "fine-tune", **more}
            return await besieged.client.post("/v1/files", data=form, files={"file": ("a", opened)})

    assert (await send(whole=False)).status_code == 400
    with PeakMemory(besieged.gateway.pid) as memory:
        made = await send(whole=True)
        assert made.status_code == 200, made.text
        async with besieged.client.stream("GET", f"/v1/files/{made.json()['id']}/content") as answer:
            assert sum([len(piece) async for piece in answer.aiter_bytes()]) == data.stat().st_size
    most_bytes = MOST_EXTRA_BYTES[settings_at(tmp_path)["blobs_url"].partition(":")[0]]
    assert memory.extra_bytes <= most_bytes, memory.extra_bytes >> 20
