"""Workers as processes: killed at every point, several at once, and `tailor worker` itself."""

import asyncio
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from adapter_store.bundle import WEIGHTS_FILE
from adapter_store.ids import TenantId
from adapter_store.proofs import proofs
from adapter_store.transactions import reading
from tests.integration.training.conftest import RECIPE, Desk, chats, saves
from tests.integration.training.mortal import POINTS, Death
from tests.storage import clean_environment
from training.jobs import Job, Status
from training.material import Material
from training.saved_runs import sweep
from training.warm_base import WarmBase

PROJECT = Path(__file__).parents[3]
NEVER = Death("never", 0)
AHEAD_S = 100  # more than a lease


class Nursery:
    """Workers, each forked from one process that has the base loaded."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.integration.training.mortal", str(folder)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
            cwd=PROJECT,
            text=True,
        )
        self._born = 0

    def start(self, desk: Desk, death: Death = NEVER, *, ahead_s: float | None = None, gate: Path | None = None) -> int:
        """A worker's process id; its clock is ahead, so that it finds the leases of those before it over."""
        self._born += 1
        order = {
            "name": f"worker-{self._born}",
            "ahead_s": AHEAD_S * self._born if ahead_s is None else ahead_s,
            "death": asdict(death),
            "gate": None if gate is None else str(gate),
            "database_url": desk.place.database_url,
            "blobs_url": desk.place.blobs_url,
            "home": str(desk.home),
            "environment": clean_environment(),  # a bucket's credentials came after this process
        }
        return self._ask(order)

    async def ended(self, pid: int) -> int:
        """How it ended: its status, or less than zero the signal."""
        return await asyncio.to_thread(self._ask, {"wait": pid})

    async def stop(self, pid: int) -> None:
        os.kill(pid, signal.SIGTERM)
        assert await self.ended(pid) == 0

    def _ask(self, order: dict[str, Any]) -> int:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()


@pytest.fixture(scope="module")
def nursery(folder: Path) -> Iterator[Nursery]:
    nursery = Nursery(folder)
    yield nursery
    nursery.close()


def alone(warm: WarmBase, folder: Path, content: bytes, **recipe: Any) -> str:
    """SHA-256 of the weights that a job gives that nothing happens to."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    (folder / "data.jsonl").write_bytes(content)
    run = warm.begin(Material("supervised", {**RECIPE, **recipe}, folder / "data.jsonl", None, None, folder))
    while not run.done:
        warm.step([run])
    return hashlib.sha256((warm.write_adapter(run, folder / "adapter") / WEIGHTS_FILE).read_bytes()).hexdigest()


async def check_outcome(desk: Desk, job: Job, expected: str) -> None:
    """One result, the right one; each step told once; nothing left over."""
    done = await desk.find(job)
    assert done.status is Status.SUCCEEDED, done.error
    assert await desk.weights(done) == expected
    assert done.total_steps is not None
    assert await desk.steps(job) == list(range(1, done.total_steps + 1))
    checkpoints = await desk.jobs.checkpoints(job.tenant_id, job.id, limit=100)
    assert [point.step for point in checkpoints] == list(range(done.total_steps, 0, -3))[:10]
    assert {version.id for version in await desk.versions(job.tenant_id)} == {point.version_id for point in checkpoints}
    assert len({point.version_id for point in checkpoints}) == len(checkpoints)
    assert (await desk.told(job)).count("The job has successfully completed") == 1


async def all_ended(desk: Desk, jobs: list[Job]) -> None:
    for job in jobs:
        await desk.ended(job)


async def wait_for_one(over: asyncio.Task[Any], ended: asyncio.Task[int]) -> None:
    await asyncio.wait([over, ended], return_when=asyncio.FIRST_COMPLETED)


async def kill_until_done(desk: Desk, nursery: Nursery, job: Job, deaths: list[Death]) -> int:
    """How many workers were killed on the way."""
    killed = 0
    for death in deaths:
        worker = nursery.start(desk, death)
        over = asyncio.create_task(desk.ended(job, 120))
        ended = asyncio.create_task(nursery.ended(worker))
        await wait_for_one(over, ended)
        if not ended.done():
            os.kill(worker, signal.SIGTERM)
        killed += await ended == -signal.SIGKILL
        over.cancel()
    return killed


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=[pytest.mark.full, pytest.mark.timeout(900)])])
async def test_a_killed_worker_s_job_ends_with_the_same_bytes_published_once(
    desk: Desk, warm: WarmBase, nursery: Nursery, count: int
) -> None:
    """kill -9 at random points of random steps, half-written saves included; the next worker goes on."""
    epochs = count + 2
    expected = alone(warm, desk.home, chats(), epochs=epochs)
    job = await desk.job(recipe={"epochs": epochs})
    rng = random.Random(count)
    deaths = [
        Death(rng.choice(POINTS[: 6 if number >= epochs - 10 else 5]), 3 * number + rng.randint(1, 3))
        for number in range(count)
    ]  # only the last ten checkpoints are written
    deaths += [Death("publishing", 3 * epochs), Death("published", 3 * epochs)]
    assert await kill_until_done(desk, nursery, job, deaths) == len(deaths)
    await check_outcome(desk, job, expected)
    await sweep(desk.engine, desk.blobs)  # the last one died before it could tidy up
    await desk.store.collect_orphans(older_than_s=-1)
    assert await saves(desk) == []


async def test_a_job_that_kills_its_workers_is_failed_and_the_others_are_not(
    desk: Desk, warm: WarmBase, nursery: Nursery
) -> None:
    """Three workers it takes; whoever shared a batch with it ends as if it had been alone."""
    expected = {number: alone(warm, desk.home, chats(seed=number), seed=number) for number in (1, 2)}
    good = {
        number: await desk.job(
            chats(seed=number), tenant=TenantId(f"ten_{number}"), recipe={"seed": number}, seed=number
        )
        for number in (1, 2)
    }
    bad = await desk.job(recipe={"seed": 13}, seed=13)
    deaths = 0
    for _ in range(10):
        worker = nursery.start(desk, Death("stepping", 4, seed=13))
        over = asyncio.create_task(all_ended(desk, [bad, *good.values()]))
        ended = asyncio.create_task(nursery.ended(worker))
        await wait_for_one(over, ended)
        if over.done():
            os.kill(worker, signal.SIGTERM)
            assert await ended == 0
            break
        over.cancel()
        assert await ended == -signal.SIGKILL
        deaths += 1
    assert deaths == 3
    failed = await desk.find(bad)
    assert failed.status is Status.FAILED
    assert failed.error is not None
    assert failed.error.code == "worker_lost"
    assert "step 3" in failed.error.message
    for number, job in good.items():
        await check_outcome(desk, job, expected[number])


async def test_two_workers_share_a_queue(desk: Desk, warm: WarmBase, nursery: Nursery, tmp_path: Path) -> None:
    """Six jobs of three tenants: each has one result, the right one, and both workers had some."""
    jobs = [
        await desk.job(chats(seed=number), tenant=TenantId(f"ten_{number % 3}"), adapter=f"bot-{number}")
        for number in range(6)
    ]
    gate = tmp_path / "gate"
    workers = [nursery.start(desk, ahead_s=0, gate=gate) for _ in range(2)]
    async with asyncio.timeout(60):
        while len({name for job in jobs if (name := (await desk.find(job)).worker)}) < 2:
            await asyncio.sleep(0.01)
    gate.touch()
    for number, job in enumerate(jobs):
        done = await desk.ended(job)
        assert await desk.weights(done) == alone(warm, desk.home, chats(seed=number))
    for worker in workers:
        await nursery.stop(worker)


SPY = """
import sys
def write(line):
    with open(HEARD, "a") as file:
        file.write(f"{line}\\n")
def hear(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        write(arguments[-1] if event == "socket.connect" else arguments[0])
sys.addaudithook(hear)
write("listening")
"""


async def test_the_command_trains_without_any_other_socket_and_stops_in_time(
    desk: Desk, warm: WarmBase, tmp_path: Path
) -> None:
    """`tailor worker` knows three settings, is small until there is a job, and gives back what it has on SIGTERM.

    Its results are proved when uploads would be.
    """
    heard, spy = tmp_path / "heard", tmp_path / "spy"
    spy.mkdir()
    (spy / "sitecustomize.py").write_text(f"HEARD = {str(heard)!r}\n{SPY}")  # it hears the worker's children too
    environment = {
        **clean_environment(),
        "TAILOR_HOME": str(desk.home),
        "TAILOR_DATABASE_URL": desk.place.database_url,
        "TAILOR_BLOBS_URL": desk.place.blobs_url,
        "TAILOR_BASE_MODEL": str(desk.folder),
        "TAILOR_BASE_MODEL_NAME": desk.base.name,
        "TAILOR_TRAINING_DEVICE": "cpu",
        "TAILOR_TRAINING_NICE": "0",
        "TAILOR_PROOF_DELAY_S": "60",
        "PYTHONPATH": f"{spy}{os.pathsep}{PROJECT}",
    }
    job = await desk.job()
    command = [str(Path(sys.executable).parent / "tailor"), "worker"]
    with (tmp_path / "log").open("wb") as log:
        worker = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=tmp_path)
    try:
        done = await desk.ended(job, 120)
        assert await desk.weights(done) == alone(warm, desk.home, chats())
        assert await _proof_due_at(desk, done) >= done.created_at + 60
        longer = await desk.job(recipe={"epochs": 1_000})
        await desk.reached(longer, lambda now: now.step > 0)
    finally:
        worker.send_signal(signal.SIGTERM)
        status = await asyncio.to_thread(worker.wait, 30)
    assert status == 0, (tmp_path / "log").read_text()
    given = await desk.find(longer)
    assert given.status is Status.QUEUED
    assert given.saved is not None
    assert given.saved.step >= given.step > 0
    allowed = ("127.0.0.1", "localhost", "/")  # where PostgreSQL and S3 are, where they are
    lines = heard.read_text().splitlines()
    assert lines[0] == "listening"
    asked = [line for line in lines if line != "listening"]
    assert all(any(place in line for place in allowed) for line in asked) if desk.place.folder is None else asked == []


async def _proof_due_at(desk: Desk, job: Job) -> int:
    due = select(proofs.c.due_at).where(proofs.c.version_id == job.version_id)
    async with reading(desk.engine) as connection:
        return int((await connection.execute(due)).scalar_one())
