"""The child process that inspects."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from adapter_store.base_model import BaseModel
from adapter_store.faults import Bounds, FaultCode
from adapter_store.inspector import Inspector
from tests.bad_adapters import BAD


@pytest.fixture
async def own(base: BaseModel) -> AsyncIterator[Inspector]:
    inspector = Inspector(base, Bounds(), timeout_s=20)
    yield inspector
    await inspector.close()


def running(inspector: Inspector) -> int:
    assert inspector.pid is not None
    return inspector.pid


async def test_every_bad_adapter_goes_through_one_worker(own: Inspector, good: Path, tmp_path: Path) -> None:
    """The whole collection leaves the worker alive, and the good adapter still passes."""
    assert (await own.inspect(good)).faults == ()
    worker = psutil.Process(own.pid)
    for bad in BAD:
        if bad.served_as is None:
            inspection = await own.inspect(bad.make(good, tmp_path / bad.name))
            assert bad.codes <= {fault.code for fault in inspection.faults}, bad.name
    assert (await own.inspect(good)).rank == 8
    assert worker.is_running()
    assert worker.memory_info().rss < 96 << 20


async def test_a_worker_that_dies_is_replaced(own: Inspector, good: Path) -> None:
    """The inspection under way ends with `inspection_failed`, the next one gets a new worker."""
    await own.inspect(good)
    pid = running(own)
    os.kill(pid, signal.SIGSTOP)
    verdict = asyncio.create_task(own.inspect(good))
    for _ in range(6):  # turns of the loop, more than it takes to ask
        await asyncio.sleep(0)
    os.kill(pid, signal.SIGKILL)
    assert [fault.code for fault in (await verdict).faults] == [FaultCode.INSPECTION_FAILED]
    assert (await own.inspect(good)).faults == ()
    assert running(own) != pid


async def test_a_worker_that_hangs_is_killed(base: BaseModel, good: Path) -> None:
    """Past the time limit the verdict is `inspection_failed`, and no process stays."""
    inspector = Inspector(base, Bounds(), timeout_s=5)
    await inspector.inspect(good)
    pid = running(inspector)
    os.kill(pid, signal.SIGSTOP)
    inspector.timeout_s = 0.1
    (fault,) = (await inspector.inspect(good)).faults
    assert fault.code is FaultCode.INSPECTION_FAILED
    assert not psutil.pid_exists(pid)


async def test_a_cancelled_inspection_does_not_answer_the_next(own: Inspector, good: Path, tmp_path: Path) -> None:
    """Answers stay with their questions."""
    bad = next(bad for bad in BAD if bad.name == "dora").make(good, tmp_path / "bad")
    await own.inspect(good)
    for turns in (0, 1, 3, 6):
        task = asyncio.create_task(own.inspect(bad))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert (await own.inspect(good)).faults == ()


async def test_close_ends_the_worker(base: BaseModel, good: Path) -> None:
    """No process is left after close."""
    inspector = Inspector(base, Bounds())
    await inspector.inspect(good)
    pid = running(inspector)
    await inspector.close()
    assert not psutil.pid_exists(pid)


async def test_the_worker_sees_no_secret(own: Inspector, good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child's environment has what Python needs, not what the gateway knows."""
    monkeypatch.setenv("TAILOR_SECRET_KEY", "canary")
    await own.inspect(good)
    pid = running(own)
    assert "TAILOR_SECRET_KEY" not in psutil.Process(pid).environ()
