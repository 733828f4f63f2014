"""`tailor up` with fake engines: several replicas, restarted in turn, killed, and gone with their parent."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from adapter_store.base_model import BaseModel
from loadtests.fake.replica import TOKEN
from tests.bad_adapters import write_base
from tests.gateways import Load, new_key, until_ready
from tests.ports import free_port
from tests.storage import clean_environment

MODEL = "base"
PROJECT = Path(__file__).parents[2]
REPLICAS = 2


class FakeStack:
    """A running `tailor up --replicas 2`."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.home = folder / "home"
        self.output = folder / "up.log"
        self.url = f"http://127.0.0.1:{free_port()}"
        self.environment = {
            **clean_environment(),
            "TAILOR_HOME": str(self.home),
            "TAILOR_PORT": self.url.rpartition(":")[2],
            "TAILOR_BASE_MODEL": str(base),
            "TAILOR_LOCAL_REPLICAS": str(REPLICAS),
            "TAILOR_REPLICA_TOKEN": TOKEN,
            "TAILOR_OPERATOR_PORT": "0",
            "TAILOR_PROBE_INTERVAL_S": "0.1",
            "TAILOR_DEVICE": "cpu",
        }
        command = [sys.executable, "-m", "tests.fakes.stack_process", BaseModel.read(base).fingerprint]
        with self.output.open("wb") as log:
            self.process = subprocess.Popen(command, env=self.environment, cwd=PROJECT, stdout=log, stderr=log)

    async def said(self, text: str) -> None:
        async with asyncio.timeout(90):
            while text not in self.output.read_text():
                assert self.process.poll() is None, self.output.read_text()
                await asyncio.sleep(0.05)

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def parts(self, module: str) -> set[int]:
        """Process ids of the parts that run this module."""
        return {process.pid for process in self.descendants() if module in process.cmdline()}

    async def replicas(self) -> list[dict[str, Any]]:
        headers = {"authorization": f"Bearer {(self.home / 'operator-key').read_text().strip()}"}
        async with httpx.AsyncClient(base_url=self.url, headers=headers) as client:
            found: list[dict[str, Any]] = (await client.get("/admin/v1/replicas")).json()["data"]
        return found

    def tailor(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [str(Path(sys.executable).parent / "tailor"), *arguments]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
async def stack(tmp_path: Path) -> AsyncIterator[FakeStack]:
    stack = FakeStack(tmp_path, write_base(tmp_path / MODEL))
    try:
        await until_ready(stack.url)
        await stack.said(f"all {REPLICAS} replicas are ready")
        yield stack
    finally:
        if stack.process.poll() is None:
            stack.process.send_signal(signal.SIGTERM)
            await asyncio.to_thread(stack.process.wait, 60)


async def test_every_part_is_restarted_in_turn_without_a_failed_request(stack: FakeStack) -> None:
    """`tailor restart` under load: other engines, another gateway process, and every request answered."""
    key = await new_key(stack.url, (stack.home / "operator-key").read_text().strip())
    engines, gateways = stack.parts("tests.fakes.replica_process"), stack.parts("gateway.server")
    generations = {replica["generation"] for replica in await stack.replicas()}
    assert len(engines) == len(generations) == REPLICAS
    async with Load([stack.url], key, MODEL).running(keeping=3, opening=2) as load:
        await load.more(20)
        done = await asyncio.to_thread(stack.tailor, "restart")
        await load.more(20)
    assert done.returncode == 0, done.stderr
    assert load.failures == []
    assert not engines & stack.parts("tests.fakes.replica_process")
    assert not gateways & stack.parts("gateway.server")
    after = await stack.replicas()
    assert [replica["state"] for replica in after] == ["ready"] * REPLICAS
    assert not generations & {replica["generation"] for replica in after}
    assert "draining replica-1" in stack.output.read_text()


async def test_nothing_outlives_the_stack(stack: FakeStack) -> None:
    """Not even kill -9 of it: engines, gateway and inspector end, and the home is free for the next one."""
    everything = stack.descendants()
    assert len(everything) >= REPLICAS + 1
    stack.process.kill()
    stack.process.wait()
    _, alive = psutil.wait_procs(everything, timeout=20)
    assert alive == []
    told = stack.tailor("restart")
    assert told.returncode == 1
    assert "No 'tailor up' uses" in told.stderr


async def test_an_engine_that_dies_leaves_the_other_and_comes_back(stack: FakeStack) -> None:
    """kill -9 of one of two: requests go on, and both are ready again."""
    key = await new_key(stack.url, (stack.home / "operator-key").read_text().strip())
    async with Load([stack.url], key, MODEL).running(keeping=2, opening=1) as load:
        await load.more(10)
        os.kill(min(stack.parts("tests.fakes.replica_process")), signal.SIGKILL)
        await load.more(10)
        async with asyncio.timeout(60):
            while [replica["state"] for replica in await stack.replicas()] != ["ready"] * REPLICAS:
                await asyncio.sleep(0.1)
    assert load.failures == []
