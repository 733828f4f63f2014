"""F5: replicas that break off, say nothing, are late or slow, and slow clients: every answer ends, and says how."""

import asyncio
import time
from typing import Any

import pytest

from gateway.replicas.replica import ReplicaState
from gateway.replicas.upstream import Connection
from loadtests.fake.replica import FakeReplica
from tests.chaos.client import BREAKS, DIALECTS, Answer, request
from tests.chaos.conftest import Figure, NewClient
from tests.integration.gateway.conftest import BASE, Gateway, RunGateway, RunReplica, until_ready
from tests.waiting import until

SILENCES = ("cut_before_answer", "hang_before_answer", "head_then_nothing")
WAYS = [(dialect, stream) for dialect in DIALECTS for stream in (False, True)]
FIRST_BYTE_S = 1.0  # of an engine that says nothing; where it says something, a stall must be no silence
BUFFER_LIMIT_BYTES = 256 << 10
EVENTS = 8


@pytest.fixture
async def replica(run_replica: RunReplica) -> FakeReplica:
    return await run_replica(events=EVENTS)


@pytest.fixture
async def gateway(run_gateway: RunGateway, replica: FakeReplica) -> Gateway:
    return await run_gateway(replica)


@pytest.fixture
async def key(gateway: Gateway) -> str:
    return (await gateway.tenant("acme")).key


@pytest.mark.parametrize("fault", BREAKS)
async def test_a_stream_that_breaks_says_so_once(
    gateway: Gateway, replica: FakeReplica, key: str, new_client: NewClient, fault: str
) -> None:
    """In every dialect: what came, one error event, no end mark; before the first event a status.

    The next request, on the same connection, is answered.
    """
    for dialect in DIALECTS:
        client = new_client(gateway.url)
        for after in (0, 1, 3):
            setattr(replica.faults, fault, after)
            broken = await client.ask(key, BASE, dialect=dialect, stream=True)
            assert broken.ending == ("error event" if after else "refused"), (dialect, after)
            assert b"CUDA" not in broken.body
            if after:
                assert broken.said == "I am the base" + "." * (after - 1)
            else:
                assert broken.status in (502, 503)
            setattr(replica.faults, fault, None)
            await until_ready(gateway)
            assert (await client.ask(key, BASE, dialect=dialect, stream=True)).ending == "whole"


@pytest.mark.parametrize("fault", BREAKS)
async def test_a_stream_that_breaks_before_its_first_event_is_answered_by_another_replica(
    run_gateway: RunGateway, run_replica: RunReplica, new_client: NewClient, fault: str
) -> None:
    """Its head had come; of that the client knows nothing. Where that one breaks too, it is told so: once is enough."""
    replicas = [await run_replica(events=EVENTS) for _ in range(3)]
    gateway = await run_gateway(*replicas)
    await until(lambda: set(gateway.parts.pool.states().values()) == {ReplicaState.READY})
    key = (await gateway.tenant("acme")).key
    client = new_client(gateway.url)
    for _ in range(80):  # second tries are a tenth of the first
        assert (await client.ask(key, BASE)).ending == "whole"
    for dialect in DIALECTS:
        for broken in replicas:
            setattr(broken.faults, fault, 0)
            assert (await client.ask(key, BASE, dialect=dialect, stream=True)).ending == "whole"
            setattr(broken.faults, fault, None)
    for broken in replicas:
        setattr(broken.faults, fault, 0)
    asked = sum(replica.request_count for replica in replicas)
    assert (await client.ask(key, BASE, stream=True)).ending == "refused"
    assert sum(replica.request_count for replica in replicas) == asked + 2


@pytest.mark.parametrize("fault", SILENCES)
async def test_a_replica_that_says_nothing_is_a_503(
    run_gateway: RunGateway, replica: FakeReplica, new_client: NewClient, fault: str
) -> None:
    """With Retry-After, within the time for a first byte; the replica is told that nobody waits any more."""
    gateway = await run_gateway(replica, first_byte_timeout_s=FIRST_BYTE_S)
    key = (await gateway.tenant("acme")).key
    setattr(replica.faults, fault, True)
    begin = time.monotonic()
    answers = await asyncio.gather(
        *(new_client(gateway.url).ask(key, BASE, dialect=dialect, stream=stream) for dialect, stream in WAYS)
    )
    assert time.monotonic() - begin < FIRST_BYTE_S + 5
    for answer in answers:
        assert (answer.ending, answer.status) == ("refused", 503)
        assert int(answer.headers["retry-after"]) >= 1
    if fault != "cut_before_answer":
        await until(lambda: replica.cancelled == len(WAYS))
    await until(lambda: replica.in_flight == 0)


@pytest.mark.parametrize(("first_byte_s", "ending"), [(5, "whole"), (FIRST_BYTE_S, "refused")])
async def test_a_late_answer_is_an_answer_until_it_is_too_late(
    run_gateway: RunGateway, replica: FakeReplica, new_client: NewClient, first_byte_s: float, ending: str
) -> None:
    """2.5 s are fine below the time for a first byte (of 300 s, by default), and a 503 above it."""
    gateway = await run_gateway(replica, first_byte_timeout_s=first_byte_s)
    key = (await gateway.tenant("acme")).key
    replica.faults.latency_s = 2.5
    answers = await asyncio.gather(
        *(new_client(gateway.url).ask(key, BASE, dialect=dialect, stream=stream) for dialect, stream in WAYS)
    )
    assert {answer.ending for answer in answers} == {ending}
    assert {answer.status for answer in answers} == {200 if ending == "whole" else 503}


async def test_a_slow_stream_is_whole(run_gateway: RunGateway, replica: FakeReplica, new_client: NewClient) -> None:
    """Events that come in halves, all together later than the time for a first byte: each comes whole, at once."""
    gateway = await run_gateway(replica, first_byte_timeout_s=3)
    key = (await gateway.tenant("acme")).key
    replica.faults.slow_s = 4 / (2 * EVENTS)

    async def read(dialect: str) -> None:
        client = new_client(gateway.url)
        answer = await client.send(request(key, BASE, dialect=dialect, stream=True), dialect=dialect, stream=True)
        for events in (1, 2):
            await client.until(answer, events=events)
            assert answer.body.endswith(b"\n\n")
            assert not answer.framed
        await client.until(answer)
        assert answer.ending == "whole"
        assert answer.said == "." * EVENTS

    await asyncio.gather(*map(read, DIALECTS))


class Scripted(FakeReplica):
    """After its second event says what no engine should, and ends the answer in good HTTP."""

    script: bytes = b""

    async def _fault(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if number != 2:
            return False
        for start in range(0, len(self.script), 60_000):
            self._chunk(writer, self.script[start : start + 60_000])
            await asyncio.sleep(0)
        writer.write(b"0\r\n\r\n")
        return True


@pytest.mark.parametrize(
    "said",
    [b'data: {"id":"x","choi', b"data: " + b"x" * (3 << 20), b""],
    ids=["half an event", "an event without end", "no end mark"],
)
async def test_events_that_are_broken_end_in_an_error(
    gateway: Gateway, replica: FakeReplica, key: str, new_client: NewClient, said: bytes
) -> None:
    """HTTP in order, the events in it not: what was whole is passed on, then one error event; nothing is piled up."""
    script(replica, said)
    for dialect in DIALECTS:
        answer = await new_client(gateway.url).ask(key, BASE, dialect=dialect, stream=True)
        assert answer.ending == "error event", dialect
        assert answer.said == "I am the base."


class Stammering(FakeReplica):
    """Writes bytes of a test's own where a whole answer is asked for, and closes."""

    said: bytes = b""

    async def _whole(self, *given: Any) -> None:
        writer: asyncio.StreamWriter = given[-1]
        writer.write(self.said)
        await writer.drain()
        raise ConnectionError


@pytest.mark.parametrize(
    "said",
    [
        b'HTTP/1.1 200 X\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"id":',
        b'HTTP/1.1 200 X\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{"id"\r\n',
        b"HTTP/1.1 200 X\r\ncontent-type: application/json\r\ncontent-length: 4\r\n\r\noops",
        b"HTTP/1.1 200 X\r\ncontent-len",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    ],
    ids=["half a body", "half its chunks", "no JSON", "half a head", "no HTTP"],
)
async def test_a_whole_answer_that_breaks_is_a_status(
    gateway: Gateway, replica: FakeReplica, key: str, new_client: NewClient, said: bytes
) -> None:
    """502 or 503 in every dialect, and nothing of the half answer."""
    replica.__class__ = Stammering
    assert isinstance(replica, Stammering)
    replica.said = said
    for dialect in DIALECTS:
        await until_ready(gateway)
        answer = await new_client(gateway.url).ask(key, BASE, dialect=dialect)
        assert answer.ending == "refused"
        assert answer.status in (502, 503)
        assert b"oops" not in answer.body


LONG = "x" * 16_000
LONG_ANSWERS = {
    "chat": (f'data: {{"id":"x","choices":[{{"index":0,"delta":{{"content":"{LONG}"}}}}]}}', "data: [DONE]"),
    "messages": (
        f'event: content_block_delta\ndata: {{"type":"x","index":0,"delta":{{"type":"text_delta","text":"{LONG}"}}}}',
        'event: message_stop\ndata: {"type":"message_stop"}',
    ),
}


@pytest.mark.parametrize("dialect", LONG_ANSWERS)
async def test_a_slow_reader_holds_the_replica_not_a_pile_of_bytes(
    gateway: Gateway, replica: FakeReplica, key: str, new_client: NewClient, figure: Figure, dialect: str
) -> None:
    """Who reads nothing for a while of 16 MB costs at most 256 KiB, and then gets every byte of them."""
    event, end = LONG_ANSWERS[dialect]
    script(replica, f"{event}\n\n".encode() * 1_000 + f"{end}\n\n".encode())
    client = new_client(gateway.url)
    answer = await client.send(request(key, BASE, dialect=dialect, stream=True), dialect=dialect, stream=True)
    await client.until(answer, events=1)
    client.pause()
    most = 0
    async with asyncio.timeout(60):
        while not (is_held(replica) and any(connection._paused for connection in upstreams(gateway))):
            most = max(most, buffered(gateway))
            await asyncio.sleep(0.001)
    read = len(answer.body)
    client.resume()
    async with asyncio.timeout(60):
        while not answer.framed:
            most = max(most, buffered(gateway))
            await asyncio.sleep(0.001)
    assert answer.ending == "whole"
    assert answer.said == "I am the base." + 1_000 * LONG
    assert 0 < most <= BUFFER_LIMIT_BYTES
    figure(f"F5 slow reader, {dialect}: {most >> 10} KiB held of {len(answer.body) >> 10} ({read >> 10} read so far)")


def script(replica: FakeReplica, said: bytes) -> None:
    replica.__class__ = Scripted
    assert isinstance(replica, Scripted)
    replica.script = said


def is_held(replica: FakeReplica) -> bool:
    """It has much to write that nobody takes."""
    return any(writer.transport.get_write_buffer_size() > 65_536 for writer in replica._writers)


def buffered(gateway: Gateway) -> int:
    """What the gateway holds for clients: what their sockets do not take, and what is not yet handed on to them."""
    held = sum(connection.transport.get_write_buffer_size() for connection in gateway.parts.connections)
    return int(held) + sum(connection._buffered for connection in upstreams(gateway))


def upstreams(gateway: Gateway) -> list[Connection]:
    """The connections on which engines answer just now."""
    return [one for member in gateway.parts.pool.members() for one in member.replica.client.upstream._busy]


def test_the_judge_knows_a_wrong_ending() -> None:
    """An answer that breaks off, goes on after its end, or ends twice has no ending at all."""
    chunk = b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n'
    error = b'data: {"error":{"message":"x"}}\n\n'
    done = b"data: [DONE]\n\n"
    wrong = b"", chunk, error, chunk + done + error, chunk + error + error, chunk + error + done, chunk + done[:-1]
    for body in wrong:
        with pytest.raises(AssertionError):
            assert Answer("chat", True, 200, {}, bytearray(body), framed=True).ending
    with pytest.raises(AssertionError):
        assert Answer("chat", False, 200, {}, bytearray(b"{}"), framed=False).ending
    assert Answer("chat", True, 200, {}, bytearray(chunk + error), framed=True).ending == "error event"
    assert Answer("chat", True, 200, {}, bytearray(chunk + done), framed=True).ending == "whole"
