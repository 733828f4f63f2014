"""The check of training files in a child process: what it tells, what bounds it, and who waits for whom."""

import asyncio
import json
import os
from pathlib import Path

import psutil
import pytest

from adapter_store.ids import TenantId
from tests.waiting import until
from training.errors import FileInvalid, TooManyChecks
from training.file_check import FileCheck

ACME, GLOBEX = TenantId("acme"), TenantId("globex")
ROW = json.dumps({"messages": [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "a dragon"}]})


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.jsonl"
    path.write_text(f"{ROW}\n")
    return path


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """One whose check takes a while."""
    path = tmp_path / "large.jsonl"
    path.write_text(f"{ROW}\n" * 15_000)
    return path


def children() -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [child for child in found if "training.file_check_worker" in child.cmdline()]


async def run(check: FileCheck, path: Path, tenant_id: TenantId = ACME) -> dict[str, object]:
    return await check.run(tenant_id, path, path.stat().st_size)


async def test_a_good_file_is_described_and_a_faulty_one_is_not(good: Path) -> None:
    """Without a base nothing counts tokens; one whose tokenizer cannot be read is as good as none."""
    report = await run(FileCheck(None), good)
    assert report["method"] == "supervised"
    assert "faults" not in report
    assert report["statistics"]["tokens"] is None  # type: ignore[index]
    base = good.parent / "base"
    base.mkdir()
    (base / "config.json").write_text('{"max_position_embeddings": 64}')
    (base / "tokenizer.json").write_text("{}")
    assert await run(FileCheck(base), good) == report
    good.write_text(f"{ROW}\n{{\n")
    with pytest.raises(FileInvalid) as refused:
        await run(FileCheck(None), good)
    assert [fault.line for fault in refused.value.faults] == [2]


async def test_as_many_faults_as_there_are_lines_are_told_up_to_a_cap(good: Path) -> None:
    """The message says that there are more."""
    good.write_text("{\n" * 1_000)
    with pytest.raises(FileInvalid, match="at least 49 more") as refused:
        await run(FileCheck(None), good)
    assert [fault.line for fault in refused.value.faults] == [*range(1, 51)]


async def test_a_check_that_takes_too_long_is_ended(large: Path) -> None:
    """The file is refused as a whole, and no process stays."""
    with pytest.raises(FileInvalid, match="could not be checked") as refused:
        await run(FileCheck(None, timeout_s=0.3), large)
    assert [fault.line for fault in refused.value.faults] == [0]
    assert children() == []


async def test_the_child_has_no_secrets_and_little_priority(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the environment but what Python needs; it gives way; whoever is cancelled takes it along."""
    monkeypatch.setenv("TAILOR_SIGNING_KEY", "a secret")
    task = asyncio.create_task(run(FileCheck(None), large))
    await until(lambda: any(child.nice() == min(19, os.nice(0) + 10) for child in children()))
    (child,) = children()
    environment = child.environ()
    assert "TAILOR_SIGNING_KEY" not in environment
    assert set(environment) <= {"TOKENIZERS_PARALLELISM", "RAYON_NUM_THREADS", *os.environ}
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert children() == []


async def test_a_large_file_keeps_nobody_else_waiting(large: Path, good: Path) -> None:
    """A small one of another tenant is checked meanwhile; of the same tenant it waits."""
    check = FileCheck(None, small_bytes=good.stat().st_size)
    first = asyncio.create_task(run(check, large))
    await until(lambda: len(children()) == 1)
    await run(check, good, GLOBEX)
    assert not first.done()
    second = asyncio.create_task(run(check, good))
    done, _ = await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
    assert done == {first}
    await second
    assert check._tenants == {}


async def test_a_file_waits_for_its_check_no_longer_than_one_may_take(large: Path, good: Path) -> None:
    """Then it is told so, and the one under way goes on."""
    check = FileCheck(None)
    first = asyncio.create_task(run(check, large))
    await until(lambda: len(children()) == 1)
    check._patience_s = 0.01
    with pytest.raises(TooManyChecks):
        await run(check, good)
    assert (await first)["method"] == "supervised"
    assert check._tenants == {}
