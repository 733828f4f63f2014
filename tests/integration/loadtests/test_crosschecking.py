"""Our figures and another tool's, of a server that both ask at the same time."""

import asyncio
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import pytest

from loadtests import gates
from loadtests.children import WITH_PARENT
from loadtests.crosschecking import CannotCompare, Check, Load
from loadtests.figures import Row
from loadtests.overhead import mock
from loadtests.playing import Server
from tests.integration.loadtests.test_playing import END, EVENTS, scripted
from tests.integration.loadtests.tools import tool
from tests.small_base import SMALL

OTHER: Final = (*WITH_PARENT, sys.executable, "-m", "tests.integration.loadtests.other_tool")
PIECE: Final = mock.chunked(b'data: {"choices":[{"index":0,"text":"red "}]}\n\n')
TTFT_S: Final = 0.4
TRIES: Final = 3
LOAD: Final = Load(requests=128, rate=30, callers=8, prompt_tokens=8, output_tokens=2)


def answering(ours_later: float) -> Callable[[bytes, dict[str, Any], asyncio.StreamWriter], Awaitable[None]]:
    """After TTFT_S; us, who name no user agent, by that share later."""

    async def answer(head: bytes, _body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(TTFT_S if b"user-agent" in head.lower() else TTFT_S * (1 + ours_later))
        writer.write(EVENTS + b"\r\n" + PIECE + END)

    return answer


async def compared(port: int, folder: Path, rounds: int = 1) -> dict[str, Row]:
    check = Check(Server(f"http://127.0.0.1:{port}", "base"), "sk-1", "none", LOAD, folder, OTHER)
    return {one.figure: one async for one in check.rows(rounds)}


@pytest.mark.parametrize("ours_later", [0.0, 0.15])
async def test_what_is_off_is_seen_and_what_is_not_passes(ours_later: float, tmp_path: Path) -> None:
    """Of both figures, though the two tools are different programs in processes of their own; a figure of which one
    stood still, and so was off by itself, has two further chances."""
    ratios = {"ttft_p50_off": 1 + ours_later, "requests_per_s_off": 1 / (1 + ours_later)}
    right: dict[str, Row] = {}
    seen: list[str] = []
    for number in range(TRIES):
        (folder := tmp_path / f"try-{number}").mkdir()
        async with scripted(answering(ours_later)) as port:
            rows = await compared(port, folder)
        assert rows["failed_requests"].value == 0
        seen += [rows[figure].line() for figure in ratios]
        right |= {
            figure: rows[figure]
            for figure, ratio in ratios.items()
            if rows[figure].detail["ratio"] == pytest.approx(ratio, abs=0.05)
        }
        if len(right) == len(ratios):
            break
    assert right.keys() == ratios.keys(), seen
    assert {one.ok for one in right.values()} == {not ours_later}, seen


def test_a_crosscheck_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C while both tools are there: exit code 2, for nothing was measured, and nothing is left."""
    with tool("crosscheck", "vllm", "--tokenizer", tmp_path) as check:
        while not any("vllm.benchmarks" in one for one in check.alive()):
            assert check.process.poll() is None
            time.sleep(0.05)
        check.process.send_signal(signal.SIGINT)
        said = check.last_words()
        assert check.left() == []
    assert check.process.returncode == gates.UNUSABLE, said
    assert "it was interrupted" in said


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_crosscheck_that_is_interrupted_has_said_what_it_measured(tmp_path: Path) -> None:
    """Ctrl-C after the first of two figures, with the other tool itself: exit code 3."""
    from training import tiny_base

    base = tiny_base.build(tmp_path / "base", recipe=SMALL).path
    words = ("--tokenizer", base, "--requests", 60, "--rate", 20, "--rounds", 1)
    with tool("crosscheck", "vllm", *words) as check:
        assert check.says("round 1: ours ")
        check.process.send_signal(signal.SIGINT)
        said = check.last_words()
        assert check.left() == []
    assert check.process.returncode == gates.INCONCLUSIVE, said
    assert '"figure": "ttft_p50_off"' in said
    assert "interrupted after 1 of 2 comparisons" in said


async def test_a_tool_that_gets_no_answer_is_not_compared(tmp_path: Path) -> None:
    """And what it was told instead is told."""

    async def refuse(head: bytes, _body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 429 Wait\r\ncontent-length: 2\r\n\r\n{}" if b"user-agent" in head.lower() else WHOLE)

    async with scripted(refuse) as port:
        with pytest.raises(CannotCompare, match="Wait"):
            await compared(port, tmp_path)


WHOLE: Final = EVENTS + b"\r\n" + PIECE + END
