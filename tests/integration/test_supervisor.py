"""Child processes: restarted when they die, gone when we go."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest

from gateway.replicas.supervisor import Child, Command
from tests.waiting import is_gone, until

# a child with a child of its own, as an engine's API server has
FAMILY = """
import subprocess, sys, time
below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(below.pid, flush=True)
time.sleep(600)
"""

DEAF = "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(600)"


@pytest.fixture
async def family(tmp_path: Path) -> AsyncIterator[Child]:
    child = Child(Command("family", [sys.executable, "-c", FAMILY], os.environ, tmp_path / "log"), stop_s=5)
    running = asyncio.create_task(child.run())
    yield child
    await child.stop()
    await running


def pids(child: Child) -> list[int]:
    """Every process that the log names, oldest first."""
    log = child.command.log
    assert log is not None
    return [int(line) for line in log.read_text().split()] if log.exists() else []


async def test_stopping_takes_the_whole_family(family: Child) -> None:
    """What the child has started goes with it."""
    await until(lambda: len(pids(family)) == 1)
    await family.stop()
    await until(lambda: is_gone(pids(family)[0]))


async def test_a_child_that_dies_is_started_again_without_its_orphans(family: Child) -> None:
    """kill -9 leaves no grandchild behind, and the next child comes by itself."""
    await until(lambda: len(pids(family)) == 1)
    assert family.pid is not None
    os.kill(family.pid, signal.SIGKILL)
    await until(lambda: len(pids(family)) == 2)
    assert family.restarts == 1
    await until(lambda: is_gone(pids(family)[0]))


async def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    """Draining has an end."""
    child = Child(Command("deaf", [sys.executable, "-c", DEAF], os.environ, tmp_path / "log"), stop_s=0.2)
    running = asyncio.create_task(child.run())
    await until(lambda: len(pids(child)) == 1)
    pid = child.pid
    await child.stop()
    await running
    assert pid is not None
    assert not psutil.pid_exists(pid)


def pids_told(child: Child) -> list[int]:
    return [] if child.pid is None else [child.pid]


async def test_a_child_that_is_stopped_while_it_is_started_does_not_stay(tmp_path: Path) -> None:
    """The process is there, but nobody knows its number yet."""
    argv = [sys.executable, "-c", "import time; time.sleep(600)"]
    child = Child(Command("young", argv, os.environ, tmp_path / "log"), stop_s=5)
    running = asyncio.create_task(child.run())
    await asyncio.sleep(0)
    assert pids_told(child) == []
    assert psutil.Process().children()
    await child.stop()
    try:
        async with asyncio.timeout(30):
            await running
    finally:
        child.kill()
    (pid,) = pids_told(child)
    assert is_gone(pid)


async def test_a_restart_is_no_death(family: Child) -> None:
    """Asked for, it happens at once, takes the whole family, and counts for nothing."""
    await until(lambda: len(pids(family)) == 1)
    before = family.pid
    await family.restart()
    await until(lambda: len(pids(family)) == 2)
    assert family.pid != before
    assert family.restarts == 0
    await until(lambda: is_gone(pids(family)[0]))


@pytest.mark.parametrize(
    ("program", "ready"), [("import os, time; os.write(1, b'ready\\n'); time.sleep(600)", True), ("", False)]
)
async def test_a_child_is_ready_when_it_says_so(tmp_path: Path, program: str, ready: bool) -> None:
    """And never, where it ends before."""
    command = Command("it", [sys.executable, "-c", program], os.environ, tmp_path / "log", tells_when_ready=True)
    child = Child(command, stop_s=5)
    running = asyncio.create_task(child.run())
    assert await child.becomes_ready(tries=1) is ready
    await child.stop()
    await running


def test_a_process_dies_with_its_parent(tmp_path: Path) -> None:
    """Not even kill -9 of the parent leaves it behind: the kernel sees to it."""
    child = (
        "import time; from adapter_store.process import die_with_parent; die_with_parent(); "
        "print('up', flush=True); time.sleep(600)"
    )
    parent = (
        "import subprocess, sys, time; "
        f"below = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE); "
        "below.stdout.readline(); print(below.pid, flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        below = psutil.Process(int(process.stdout.readline()))
        process.kill()
        _, alive = psutil.wait_procs([below], timeout=10)
        assert alive == []
