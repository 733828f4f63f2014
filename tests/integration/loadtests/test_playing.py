"""Playing a schedule: what is sent when, and what is written down, against servers that answer rightly and wrongly."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loadtests.bodies import CANARY_TOKENS
from loadtests.overhead import mock
from loadtests.playing import CannotPlay, Keys
from loadtests.progress import Progress
from loadtests.recording import ABSENT, TIERS, Outcome
from tests.integration.loadtests.playing import MS, NS, plan, played, scenario, schedule

EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n"
TOKEN = mock.chunked(b'data: {"choices":[{"index":0,"delta":{"content":"red "}}]}\n\n')
USAGE = (
    b'data: {"choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2,'
    b'"prompt_tokens_details":{"cached_tokens":5}}}\n\n'
)
END = mock.chunked(USAGE) + mock.chunked(b"data: [DONE]\n\n") + mock.chunked(b"")
RECEIPTS = (
    b"x-tailor-version: 3; sha256=abc\r\nx-tailor-replica: r1\r\n"
    b'server-timing: queue;dur=1.500, load;dur=20.250, adapter;desc="cold"\r\n\r\n'
)
ANSWERS = {
    "whole": EVENTS + RECEIPTS + TOKEN * 2 + END,
    "refused": b"HTTP/1.1 429 Wait\r\ncontent-length: 2\r\n\r\n{}",
    "away": b"HTTP/1.1 503 Away\r\nretry-after: 1\r\ncontent-length: 2\r\n\r\n{}",
    "fault": b"HTTP/1.1 503 Fault\r\ncontent-length: 2\r\n\r\n{}",
    "missing": b'HTTP/1.1 404 Not Found\r\ncontent-length: 30\r\n\r\n{"error":{"code":"not_found"}}',
    "error": EVENTS + b"\r\n" + TOKEN + mock.chunked(b'event: error\ndata: {"error":{"code":"lost"}}\n\n') + END,
    "no-done": EVENTS + b"\r\n" + TOKEN + mock.chunked(b""),
    "cut": EVENTS + b"\r\n" + TOKEN,
    "closed": b"",
    "garbage": b"SMTP ready\r\n\r\n",
}


@asynccontextmanager
async def scripted(
    answer: Callable[[bytes, dict[str, Any], asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[int]:
    """A server whose answers `answer` writes, head and body of each request in hand; yields its port."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serving.append(asyncio.current_task())
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                await answer(head, json.loads(await reader.readexactly(length)), writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)

    serving: list[asyncio.Task[None] | None] = []
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]
    await asyncio.gather(*(task for task in serving if task is not None))


@asynccontextmanager
async def trivial() -> AsyncIterator[int]:
    """The overhead benchmark's upstream; a request's `seed` is the µs between its chunks."""
    server = await mock.listen(mock.Engine("mock"))
    async with server:
        yield server.sockets[0].getsockname()[1]


async def by_model(head: bytes, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
    """The answer that the model's name says; one that is not whole ends the connection."""
    writer.write(ANSWERS[body["model"]])
    if body["model"] in ("cut", "closed", "garbage"):
        await writer.drain()
        writer.close()


async def test_every_request_of_two_processes_is_written_down_with_its_times(tmp_path: Path) -> None:
    """In order of the schedule, sent at its time, with every chunk, and counted live."""
    progress: list[Progress] = []
    async with trivial() as port:
        planned = plan(200, every_ns=5 * MS, output_tokens=8, parameters=0)
        planned["tenant"][150:] = 1
        steps = scenario(chat={"parameters": [{"share": 1, "fields": {"seed": 2_000}}]})
        samples, lateness = await played(
            port, schedule(planned), tmp_path, of=steps, processes=2, on_progress=progress.append
        )
    rows = samples.rows
    assert rows["index"].tolist() == list(range(200))
    assert set(rows["outcome"]) == {Outcome.WHOLE}
    assert rows["scheduled"].tolist() == planned["at"].tolist()
    assert (rows["sent"] >= rows["scheduled"]).all()
    assert (rows["sent"] < rows["headers"]).all()
    assert (rows["first"] <= rows["last"]).all()  # chunks that come in one reading have one time
    assert (rows["first"] < rows["last"]).any()
    assert (rows["last"] <= rows["done"]).all()
    assert set(rows["chunks"]) == {8}
    assert set(rows["completion_tokens"]) == {8}
    assert len(samples.chunk_at) == samples.chunk_ends[-1] == 1_600
    firsts = samples.chunk_at[samples.chunk_ends - 8]
    assert (firsts == (rows["first"] - rows["sent"]) // 1_000).all()
    assert {one.process for one in lateness} == {0, 1}
    last = progress[-1].groups
    assert (last["a"].sent, last["a"].done, last["a"].tokens) == (150, 150, 1_200)
    assert (last["b"].sent, last["b"].in_flight, last["b"].failed) == (50, 0, 0)
    assert last["b"].ttft_us.count == 50
    assert last["b"].itl_us.count == 350
    gaps = np.concatenate([np.diff(one) for one in np.split(samples.chunk_at, samples.chunk_ends[:150])[:150]])
    assert last["a"].itl_us.count == len(gaps) == 1_050
    assert last["a"].itl_us.quantile(0.5) == pytest.approx(np.sort(gaps)[524], rel=0.02)  # buckets of 1 %
    assert np.median(gaps) > 1_000  # 2 ms on a machine that does nothing else


async def test_each_way_to_fail_is_told_apart(tmp_path: Path) -> None:
    """Statuses, error events, a missing end, a broken connection; what a server says is read, not believed."""
    names = sorted(ANSWERS)
    async with scripted(by_model) as port:
        planned = plan(len(names), every_ns=20 * MS, model=np.arange(len(names)))
        samples, _ = await played(port, schedule(planned, names), tmp_path)
    seen = {name: Outcome(row["outcome"]) for name, row in zip(names, samples.rows, strict=True)}
    assert seen == {
        "whole": Outcome.WHOLE,
        "refused": Outcome.REFUSED,
        "away": Outcome.REFUSED,
        "fault": Outcome.STATUS,
        "missing": Outcome.STATUS,
        "error": Outcome.ERROR_EVENT,
        "no-done": Outcome.TRUNCATED,
        "cut": Outcome.TRUNCATED,
        "closed": Outcome.BROKEN,
        "garbage": Outcome.BROKEN,
    }
    row = samples.rows[names.index("whole")]
    told = {name: samples.texts[row[name]] for name in ("version", "replica", "error")}
    assert told == {"version": "3; sha256=abc", "replica": "r1", "error": ""}
    assert (TIERS[row["tier"]], row["queue_us"], row["load_us"]) == ("cold", 1_500, 20_250)
    assert (row["prompt_tokens"], row["completion_tokens"], row["cached_tokens"]) == (7, 2, 5)
    errors = {name: samples.texts[one["error"]] for name, one in zip(names, samples.rows, strict=True)}
    assert (errors["missing"], errors["error"], errors["fault"]) == ("not_found", "lost", "http 503")


async def test_a_canary_has_its_own_request_and_its_answer_is_kept(tmp_path: Path) -> None:
    """Streamed or whole, the same text; other requests' answers are thrown away."""
    asked: list[dict[str, Any]] = []

    async def answer(head: bytes, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        asked.append(body)
        if body.get("stream"):
            writer.write(ANSWERS["whole"])
        else:
            text = b'{"choices":[{"message":{"content":"red red "}}],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
            writer.write(mock.OK % (len(text), text))

    workloads = scenario(streamed={}, whole={"stream": False})
    planned = plan(4, every_ns=20 * MS, workload=[0, 1, 0, 1], canary=[True, True, False, False])
    async with scripted(answer) as port:
        samples, _ = await played(port, schedule(planned, workloads=["streamed", "whole"]), tmp_path, of=workloads)
    rows = samples.rows
    assert set(rows["outcome"]) == {Outcome.WHOLE}
    assert [samples.texts[one] if one != ABSENT else None for one in rows["answer"]] == ["red red "] * 2 + [None] * 2
    assert rows["chunks"].tolist() == [2, 1, 2, 1]
    assert asked[0]["messages"] == asked[1]["messages"] != asked[2]["messages"]
    assert (asked[0]["temperature"], asked[0]["max_tokens"]) == (0, CANARY_TOKENS)
    assert asked[2]["messages"] != asked[3]["messages"]
    assert asked[2]["max_tokens"] == asked[2]["min_tokens"] == 4


async def test_a_client_that_leaves_and_an_answer_that_never_comes(tmp_path: Path) -> None:
    """The connection ends at the planned time, or at the scenario's limit."""

    async def answer(head: bytes, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(EVENTS + b"\r\n" + TOKEN)

    planned = plan(2, abort_after=[100 * MS, ABSENT])
    async with scripted(answer) as port:
        samples, _ = await played(port, schedule(planned), tmp_path, of=scenario(timeout_s=1.5))
    rows = samples.rows
    assert rows["outcome"].tolist() == [Outcome.ABORTED, Outcome.TIMEOUT]
    left, timed_out = rows["done"] - rows["sent"]
    assert 90 * MS < left < 5 * NS
    assert 1_490 * MS < timed_out < 5 * NS
    assert rows["chunks"].tolist() == [1, 1]


async def test_callers_of_a_closed_loop_wait_for_their_answers(tmp_path: Path) -> None:
    """Never more in flight than callers, until the phase ends; what had no turn is unsent."""
    running, most = 0, 0

    async def answer(head: bytes, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        writer.write(ANSWERS["whole"])

    planned = plan(605, at=ABSENT, caller=np.minimum(np.arange(605) // 200, 3))
    told = replace(schedule(planned), phases=((0, 3 * NS),))  # a stall takes one or two of them
    async with scripted(answer) as port:
        samples, lateness = await played(port, told, tmp_path, processes=2)
    assert sum(one.idle_callers for one in lateness) == 1, "the fourth had five to ask"
    rows = samples.rows
    sent = rows[rows["outcome"] != Outcome.UNSENT]
    assert most == 4
    assert 20 < len(sent) <= 455
    assert (sent["scheduled"] == sent["sent"]).all()
    assert sent["sent"].max() < 3 * NS
    assert set(rows["outcome"]) == {Outcome.WHOLE, Outcome.UNSENT}


async def test_a_key_that_was_rotated_is_used_at_once(tmp_path: Path) -> None:
    """Requests sent after the change have the new key, those of another tenant theirs."""
    keys, seen = Keys(["sk-old", "sk-b"]), []

    async def answer(head: bytes, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        seen.append(head.partition(b"Bearer ")[2].split(b"\r\n")[0])
        if len(seen) == 1:
            keys.change(0, "sk-new")
        writer.write(ANSWERS["whole"])

    planned = plan(3, every_ns=300 * MS, tenant=[0, 0, 1])
    async with scripted(answer) as port:
        await played(port, schedule(planned), tmp_path, keys=keys)
    assert seen == [b"sk-old", b"sk-new", b"sk-b"]


async def test_a_server_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    """Nothing was measured."""
    async with trivial() as port:
        pass
    with pytest.raises(CannotPlay, match=f"cannot reach http://127.0.0.1:{port}"):
        await played(port, schedule(plan(1)), tmp_path)
