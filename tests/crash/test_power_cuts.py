"""D1 and D2: a kill or a power cut at any point of upload, publish, alias flip and delete leaves all or nothing.

A child works on a real store (SQLite, a folder) and is stopped before each of its operations on files: SQLite's,
obstore's and our own. What is left then is opened again: it must be the state after the last acknowledged operation or
after the one under way, with every blob whole, and nothing but what versions name after orphans were collected.
"""

import asyncio
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="traces system calls of Linux on x86-64"
)
QUICK_POINTS = 8
QUICK_TROUBLES = 4
FULL_POINTS = 500


async def sweep(folder: Path, *options: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.crash.sweep", str(folder), *options]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    process = await asyncio.create_subprocess_exec(*command, env=environment, stdout=asyncio.subprocess.PIPE)
    told, _ = await process.communicate()
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(told)
    print({**found, "faults": len(found["faults"])})  # noqa: T201  the figure of this run
    return found


async def test_what_was_acknowledged_survives(tmp_path: Path) -> None:
    """8 of the more than 500 points, one kind of loss at each in turn; and all kinds of loss at the end."""
    found = await sweep(tmp_path, "--points", str(QUICK_POINTS))
    assert found["faults"] == []
    assert (found["points"], found["states"]) == (QUICK_POINTS, QUICK_POINTS)
    assert found["operations"] >= FULL_POINTS


@pytest.mark.full
@pytest.mark.timeout(7_200)
async def test_what_was_acknowledged_survives_at_every_point(tmp_path: Path) -> None:
    """Every point, at least 500, and at each all kinds of loss."""
    found = await sweep(tmp_path, "--all-losses")
    assert found["faults"] == []
    assert found["points"] == found["operations"] >= FULL_POINTS


async def test_what_fails_is_refused_whole_and_recovers_by_itself(tmp_path: Path) -> None:
    """D2: no space, EIO or a read-only disk at 4 of the points, for one operation or for thirty.

    Each is told as StorageError (507 or 503), leaves all or nothing, and succeeds when it is repeated afterwards, in
    the same process.
    """
    found = await sweep(tmp_path, "--points", str(QUICK_TROUBLES), "--errors")
    assert found["faults"] == []
    assert found["refused"] >= QUICK_TROUBLES


@pytest.mark.full
@pytest.mark.timeout(7_200)
async def test_what_fails_at_any_point_is_refused_whole_and_recovers_by_itself(tmp_path: Path) -> None:
    """D2 at every point, at least 500."""
    found = await sweep(tmp_path, "--errors")
    assert found["faults"] == []
    assert found["states"] >= FULL_POINTS


async def test_a_store_that_does_not_sync_is_found_out(tmp_path: Path) -> None:
    """The sweep can fail: without the fsync in blobs.py acknowledged adapters are gone after a power cut."""
    found = await sweep(tmp_path, "--points", "1", "--without", "sync")
    assert any("gone or short" in fault for fault in found["faults"])
