"""The overhead benchmark itself: what its client reads, what its mock writes, how it judges."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapter_store.base_model import BaseModel
from adapter_store.bundle import bundle_digest
from adapter_store.inspection import Bounds, inspect
from loadtests import figures
from loadtests.overhead import bodies, mock, report
from loadtests.overhead.client import Connection, Reply, Target, now
from loadtests.overhead.model_files import BASE_NAME, adapter_files, write_base
from loadtests.overhead.phases import PHASES, Sample, closed_loop, first_token, median, streams
from loadtests.overhead.processes import busy_ns, cpu_ns, listeners, on_core, rss_mib, with_descendants
from loadtests.overhead.stack import CannotMeasureError

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
FAST = Sample(operations=100, failed=0, per_s=1_000.0, p50_us=100.0, p99_us=200.0, cpu_us=10.0)


class Wire(asyncio.Transport):
    """Takes what is written and goes nowhere."""

    def write(self, data: object) -> None:
        pass


def asked(*, stream: bool) -> tuple[Connection, "asyncio.Future[Reply]"]:
    """A connection that waits for its answer."""
    connection = Connection()
    connection.connection_made(Wire())
    return connection, connection.send(b"", stream)


def event(text: str) -> bytes:
    return mock.chunked(f"data: {text}\n\n".encode())


async def test_an_answer_with_a_length_ends_with_its_last_byte() -> None:
    """However the pieces are cut."""
    connection, done = asked(stream=False)
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nabc":
        connection.data_received(bytes([byte]))
    assert not done.done()
    connection.data_received(b"d")
    assert (await done).ok


async def test_a_stamp_that_is_cut_in_two_is_read_once() -> None:
    """A proxy may split a chunk anywhere: each stamp counts once, and none is lost."""
    stream = HEAD + b"".join(event(f'{{"content":"@{now()} "}}') for _ in range(3)) + mock.DONE
    for size in (1, 7, 29, len(stream)):
        connection, done = asked(stream=True)
        for start in range(0, len(stream), size):
            connection.data_received(stream[start : start + size])
        reply = await done
        assert reply.ok
        assert len(reply.lags) == 3
        assert all(lag > 0 for lag in reply.lags)


@pytest.mark.parametrize("end", [b"0\r\n\r\n", event('{"error":{}}') + b"0\r\n\r\n"])
async def test_a_stream_without_its_done_is_a_failure(end: bytes) -> None:
    """A gateway that ends a broken stream in an error event has not answered."""
    connection, done = asked(stream=True)
    connection.data_received(HEAD + event(f"@{now()} ") + end)
    assert not (await done).ok


async def test_a_connection_that_breaks_is_a_failure() -> None:
    """Though its head said 200."""
    connection, done = asked(stream=True)
    connection.data_received(HEAD + event(f"@{now()} "))
    connection.connection_lost(None)
    assert not (await done).ok
    assert connection.broken


async def test_a_refusal_is_a_failure() -> None:
    """A 429 costs little: counted as an answer it would flatter."""
    connection, done = asked(stream=False)
    connection.data_received(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 0\r\n\r\n")
    assert not (await done).ok


@pytest.fixture
async def engine() -> AsyncIterator[tuple[mock.Engine, Target]]:
    engine = mock.Engine("f" * 64)
    server = await mock.listen(engine)
    yield engine, Target("direct", server.sockets[0].getsockname()[1])
    server.close()
    await server.wait_closed()


async def test_the_loads_count_what_the_mock_sent(engine: tuple[mock.Engine, Target]) -> None:
    """Requests and chunks, all of them good."""
    _, target = engine
    requests = await closed_loop(target, 0.05, 2)
    assert requests.operations > 0
    assert (await first_token(target, 3)).p50_us > 0
    chunks = await streams(target, 1_000, 0.02, 4)
    assert chunks.operations == 4 * 20
    assert requests.failed == chunks.failed == 0


async def test_running_usage_is_written_as_vllm_does(engine: tuple[mock.Engine, Target]) -> None:
    """After the choices of every chunk, and once more alone at the end."""
    _, target = engine
    options = {"include_usage": True, "continuous_usage_stats": True}
    asking = target.request(stream=True, max_tokens=3, stream_options=options)
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    writer.write(asking)
    answer = await reader.readuntil(b"\r\n0\r\n\r\n")
    writer.close()
    lines = [line[6:] for line in answer.split(b"\r\n") if line.startswith(b"data: {")]
    events: list[dict[str, Any]] = [json.loads(line) for line in lines]
    assert [one["usage"]["completion_tokens"] for one in events] == [1, 2, 3, 3, 3]
    assert events[0]["usage"] == {"prompt_tokens": 12, "total_tokens": 13, "completion_tokens": 1}
    assert [len(one["choices"]) for one in events] == [1, 1, 1, 1, 0]


async def test_a_stream_that_its_client_leaves_is_counted(engine: tuple[mock.Engine, Target]) -> None:
    """So that a target which leaves streams behind is seen."""
    seen, target = engine
    reader, watching = await asyncio.open_connection("127.0.0.1", target.port)

    async def look() -> None:
        watching.write(b"GET /stats HTTP/1.1\r\n\r\n")
        await reader.readuntil(b"}")

    streaming, leaving = await asyncio.open_connection("127.0.0.1", target.port)
    leaving.write(target.request(stream=True, max_tokens=1_000, seed=1_000))
    await streaming.readuntil(b"\r\n\r\n")
    await look()
    assert seen.aborted == 0
    leaving.close()
    await leaving.wait_closed()
    while seen.aborted == 0:
        await look()
    watching.close()


def test_the_mock_names_an_adapter_s_content_as_the_store_does() -> None:
    """The gateway finds in the state what it loaded: same owner, same digest."""
    engine = mock.Engine("f" * 64)
    files = [
        {"name": "adapter_config.json", "key": "k", "sha256": "1" * 64, "bytes": 1},
        {"name": "adapter_model.safetensors", "key": "k", "sha256": "2" * 64, "bytes": 2},
    ]
    engine.load("a-00", json.dumps({"owner": "tnt_1", "files": files}).encode())
    told = engine.adapters["a-00"]
    assert (told["owner"], told["digest"], told["bytes"]) == ("tnt_1", bundle_digest("1" * 64, "2" * 64), 3)


def test_the_files_pass_the_inspection(tmp_path: Path) -> None:
    """Base and adapter fit one another."""
    base = BaseModel.read(write_base(tmp_path / BASE_NAME))
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, content in adapter_files().items():
        (folder / name).write_bytes(content)
    assert inspect(folder, base, Bounds(64, 1 << 20)).faults == ()


def samples(**gateway: float) -> dict[str, dict[str, Sample]]:
    """Phases in which direct and nginx are alike, and the gateway is as given."""
    slow = replace(FAST, **gateway)  # type: ignore[arg-type]
    return {phase: {"direct": FAST, "nginx": FAST, "gateway": slow} for phase in PHASES}


def test_a_figure_on_its_bound_is_kept_and_one_past_it_is_missed() -> None:
    """On both sides: the less the better, and the more the better."""
    assert report.row("cpu_per_request_over_nginx", 4.5).ok
    assert not report.row("cpu_per_request_over_nginx", 4.51).ok
    assert report.row("chunks_per_s_over_direct", 0.95).ok
    assert not report.row("chunks_per_s_over_direct", 0.94).ok


def test_one_missed_must_fails_the_run() -> None:
    """And a failed request is one."""
    good = report.load_rows(samples(cpu_us=15.0, per_s=980.0))
    assert figures.exit_code(good) == 0
    assert figures.exit_code([*good, report.row("memory_per_worker_mib", 90.1)]) == 1
    assert figures.exit_code(report.load_rows(samples(cpu_us=50.0, per_s=980.0))) == 1
    assert figures.exit_code(report.load_rows(samples(cpu_us=15.0, per_s=980.0, failed=1))) == 1


def test_figures_compare_the_gateway_with_the_yardstick_that_is_meant() -> None:
    """CPU and first token with nginx, rates with the upstream itself."""
    rows = {row.figure: row for row in report.load_rows(samples(cpu_us=25.0, per_s=500.0, p50_us=160.0))}
    assert rows["cpu_per_request_over_nginx"].value == 2.5
    assert rows["cpu_per_chunk_over_nginx"].value == 2.5
    assert rows["requests_per_s_over_direct"].value == 0.5
    assert rows["chunks_per_s_over_direct"].value == 0.5
    assert rows["added_ttft_p50_us"].value == 60.0


def test_a_line_is_a_json_object_with_figure_value_must_and_ok() -> None:
    """What a script reads."""
    told = json.loads(report.row("start_to_ready_s", 1.25, each_s=[1.25]).line())
    assert told["figure"] == "start_to_ready_s"
    assert (told["value"], told["must"], told["aim"], told["ok"]) == (1.25, 3, 1.5, True)
    assert told["each_s"] == [1.25]


def test_every_figure_of_the_table_has_a_line() -> None:
    """The markdown says which way each bound goes."""
    table = figures.markdown([report.row("chunks_per_s_over_direct", 0.97), report.row("resolve_admit_rss_mib", 90)])
    assert "| 0.97 | ≥ 0.95 | ≥ 0.98 |" in table
    assert "| 90 | ≤ 150 |  |" in table


def test_medians_are_of_the_calmer_half_and_failures_of_all() -> None:
    """A round in which others took the cores says little of the target, but a failure in it is a failure."""
    calm, disturbed = replace(FAST, others=0.1), replace(FAST, cpu_us=99.0, failed=2, others=0.9)
    rounds = [{phase: {"direct": one} for phase in PHASES} for one in (calm, disturbed, calm)]
    merged = median(rounds)["requests"]["direct"]
    assert merged.cpu_us == 10.0
    assert merged.failed == 2
    assert merged.operations == 300


def test_descendants_of_a_process_are_found_at_any_depth() -> None:
    """A worker of a worker costs too; a stranger does not."""
    assert with_descendants({1}, {2: 1, 3: 2, 4: 9, 9: 8}) == {1, 2, 3}


async def test_the_processes_behind_a_port_are_found(engine: tuple[mock.Engine, Target]) -> None:
    """The mock of this test runs in this process, which has used CPU and memory."""
    pids = listeners(engine[1].port)
    assert os.getpid() in pids
    assert cpu_ns([os.getpid()]) > 0
    assert rss_mib(os.getpid()) > 1
    assert busy_ns(os.sched_getaffinity(0)) > 0


def test_a_core_is_given_back() -> None:
    """What is started after the block may run anywhere again."""
    before = os.sched_getaffinity(0)
    with on_core(min(before)):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before


def test_the_dearest_ordinary_body_is_the_figure() -> None:
    """Above 3 ms it fails the run; a body that is refused is no figure."""
    told = [{"figure": f"policy: {name}", "value_ms": ms, "told": "sent"} for name, ms in (("a", 1.0), ("b", 2.9))]
    kept = bodies.worst(map(json.dumps, told))
    assert (kept.value, figures.exit_code([kept])) == (2.9, 0)
    told[0]["value_ms"] = 3.1
    missed = bodies.worst(map(json.dumps, told))
    assert (missed.value, figures.exit_code([missed])) == (3.1, 1)
    told[1]["told"] = "refused"
    with pytest.raises(CannotMeasureError, match="policy: b"):
        bodies.worst(map(json.dumps, told))
    with pytest.raises(CannotMeasureError):
        bodies.worst([])
