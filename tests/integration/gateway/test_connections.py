"""What one connection can do to a gateway: pipelines, trailers, slow bodies and slow readers."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import pytest

from gateway.body_room import ROOM_BYTES
from gateway.protocol import Exchange, FrontProtocol
from loadtests.fake.replica import FakeReplica
from tests.fakes.transport import protocol_of
from tests.integration.gateway.conftest import BASE, Gateway, RunGateway, RunReplica, Tenant
from tests.waiting import until

BODY = b'{"model": "base", "messages": [{"role": "user", "content": "x"}]}'


async def connect(
    gateway: Gateway, receive_bytes: int | None = None
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = gateway.url.removeprefix("http://").split(":")
    client = socket.socket()
    if receive_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.setblocking(False)
    await asyncio.get_running_loop().sock_connect(client, (host, int(port)))
    return await asyncio.open_connection(sock=client, limit=1_024)


def chat(key: str, body: bytes = BODY, *lines: bytes) -> bytes:
    more = b"".join(line + b"\r\n" for line in lines)
    return (
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n%bcontent-length: %d\r\n\r\n%b"
    ) % (key.encode(), more, len(body), body)


async def test_many_pipelined_requests_are_all_answered(acme: Tenant, gateway: Gateway) -> None:
    """Refused at once, one after the other, none within another: the last is answered like the first."""
    reader, writer = await connect(gateway)
    for _ in range(20):
        writer.write(chat(acme.key, b"{}") * 10)
        for _ in range(10):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400")
            length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
    writer.close()


async def test_a_stream_of_events_ends_with_its_connection_though_more_is_asked_for(
    acme: Tenant, gateway: Gateway
) -> None:
    """uvicorn tells the last of several pipelined requests alone that its client has gone."""
    rows = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n' * 12
    sent = await acme.client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", rows)})
    made = await acme.client.post(
        "/v1/fine_tuning/jobs", json={"model": BASE, "training_file": sent.json()["id"], "suffix": "bot"}
    )
    assert made.status_code == 200, made.text
    asked = b"GET %b HTTP/1.1\r\nhost: x\r\nauthorization: Bearer %b\r\n\r\n"
    stream = f"/v1/fine_tuning/jobs/{made.json()['id']}/events?stream=true".encode()
    reader, writer = await connect(gateway)
    writer.write(asked % (stream, acme.key.encode()) + asked % (b"/health", b"-"))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    assert gateway.parts.event_streams.total() == 1
    writer.close()
    await until(lambda: not gateway.parts.event_streams)


async def test_a_pipeline_without_end_is_cut_off(acme: Tenant, gateway: Gateway) -> None:
    """Thousands of requests in one packet are nobody's need."""
    reader, writer = await connect(gateway)
    writer.write(chat(acme.key) * 2_000)

    async def read_all() -> None:
        for _ in range(2_000):
            await reader.readuntil(b"\r\n\r\n")

    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await read_all()
    writer.close()


async def test_garbage_in_the_middle_of_a_stream_is_not_answered_into_it(
    acme: Tenant, gateway: Gateway, replica: FakeReplica
) -> None:
    """The stream ends with its connection; no second head stands in it."""
    replica.events, replica.faults.event_delay_s = 200, 0.02
    reader, writer = await connect(gateway)
    body = b'{"model": "base", "stream": true, "messages": [{"role": "user", "content": "x"}]}'
    writer.write(chat(acme.key, body))
    await reader.readuntil(b"data: ")
    writer.write(b"\x00\x01 no HTTP\r\n\r\n")
    rest = b""
    with suppress(ConnectionError):
        while more := await reader.read(4_096):
            rest += more
    assert b"HTTP/1.1" not in rest
    assert b"[DONE]" not in rest
    writer.close()


async def test_a_request_with_garbage_behind_it_in_one_read_is_not_begun(acme: Tenant, gateway: Gateway) -> None:
    """Its client has a 400 for both, and its connection is closed: nothing is generated for it."""
    written: list[bytes] = []
    protocol = protocol_of(gateway.front, written.append)
    protocol.data_received(chat(acme.key) + b"\x00\x01 no HTTP\r\n\r\n")
    assert [data.startswith(b"HTTP/1.1 400") for data in written] == [True]
    assert not protocol.tasks
    protocol.connection_lost(None)


async def answered(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Head and body of the next answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    return head, await reader.readexactly(length)


H2C = (b"connection: Upgrade, HTTP2-Settings", b"upgrade: h2c", b"http2-settings: AAMAAABkAARAAAAAAAIAAAAA")


async def test_an_offer_of_another_protocol_is_passed_over(acme: Tenant, gateway: Gateway) -> None:
    """Java's client makes one with its first request; the body comes with the head, or later, and more behind it."""
    reader, writer = await connect(gateway)
    writer.write(chat(acme.key, BODY, *H2C) + chat(acme.key, b"{}"))
    assert (await answered(reader))[0].startswith(b"HTTP/1.1 200")
    assert (await answered(reader))[0].startswith(b"HTTP/1.1 400")
    for piece in (chat(acme.key, BODY, *H2C)[: -len(BODY)], BODY[:9], BODY[9:]):
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.05)
    assert (await answered(reader))[0].startswith(b"HTTP/1.1 200")
    made = b'{"label": "mine", "scopes": ["inference"]}'
    writer.write(chat(acme.key, made, *H2C).replace(b"/v1/chat/completions", b"/v1/keys"))
    assert (await answered(reader))[0].startswith(b"HTTP/1.1 403")  # this key may not, which is told of the whole body
    writer.write(chat(acme.key, b"{}", *H2C, b"connection: close"))
    assert (await answered(reader))[0].startswith(b"HTTP/1.1 400")
    assert await reader.read() == b""
    writer.close()


async def test_a_length_may_have_zeros_before_it(acme: Tenant, gateway: Gateway) -> None:
    """Thousands of them, and a body that comes later."""
    reader, writer = await connect(gateway)
    writer.write(chat(acme.key)[: -len(BODY)].replace(b"content-length: ", b"content-length: " + b"0" * 5_000))
    await writer.drain()
    await asyncio.sleep(0.05)
    writer.write(BODY)
    assert (await answered(reader))[0].startswith(b"HTTP/1.1 200")
    writer.close()


async def test_offers_without_end_are_cut_off(acme: Tenant, gateway: Gateway) -> None:
    """Each is read again: no more of them than of other requests."""
    reader, writer = await connect(gateway)
    writer.write(chat(acme.key, b"", *H2C) * 1_000)

    async def read_all() -> None:
        for _ in range(1_000):
            await answered(reader)

    with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
        await read_all()
    writer.close()


@pytest.mark.parametrize("url", [b"http://x/v1/chat/completions", b"/v1/chat/%63ompletions", b"//x"])
async def test_a_path_may_be_spelled_in_other_ways(acme: Tenant, gateway: Gateway, url: bytes) -> None:
    """As clients of proxies do it, or careful ones; what is no path of ours is a 404."""
    reader, writer = await connect(gateway)
    writer.write(chat(acme.key).replace(b"/v1/chat/completions", url))
    head, _ = await answered(reader)
    assert head.startswith(b"HTTP/1.1 404" if url == b"//x" else b"HTTP/1.1 200")
    writer.close()


async def test_a_stream_for_http_1_0_ends_with_its_connection(acme: Tenant, gateway: Gateway) -> None:
    """It knows no chunks: events as they are, then the end."""
    reader, writer = await connect(gateway)
    body = BODY[:-1] + b', "stream": true}'
    writer.write(chat(acme.key, body).replace(b"HTTP/1.1", b"HTTP/1.0"))
    head, _, events = (await reader.read(-1)).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower()
    assert events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")
    writer.close()


async def test_no_answer_for_http_1_0_has_chunks(acme: Tenant, gateway: Gateway) -> None:
    """A stream of a job's events, and a file: neither says how long it is, or both do."""
    rows = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n' * 12
    sent = await acme.client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", rows)})
    file = sent.json()["id"]
    made = await acme.client.post("/v1/fine_tuning/jobs", json={"model": BASE, "training_file": file, "suffix": "bot"})
    job = made.json()["id"]
    await acme.client.post(f"/v1/fine_tuning/jobs/{job}/cancel")
    told = {}
    for path in (f"/v1/fine_tuning/jobs/{job}/events?stream=true", f"/v1/files/{file}/content", "/v1/usage", "/none"):
        reader, writer = await connect(gateway)
        asked = b"GET %b HTTP/1.0\r\nhost: x\r\nauthorization: Bearer %b\r\n\r\n"
        writer.write(asked % (path.encode(), acme.key.encode()))
        head, _, told[path] = (await reader.read(-1)).partition(b"\r\n\r\n")
        assert b"transfer-encoding" not in head.lower(), path
        assert b"connection: close" in head.lower(), path
        writer.close()
    events, content, usage, none = told.values()
    assert events.startswith(b"data: {")
    assert events.endswith(b"data: [DONE]\n\n")
    assert content == rows
    assert usage.startswith(b"{")
    assert none.endswith(b"}")


async def test_a_large_body_may_bring_the_next_head_along(acme: Tenant, gateway: Gateway) -> None:
    """It is no part of that head, whose bound is smaller."""
    reader, writer = await connect(gateway)
    long = BODY.replace(b'"x"', b'"%b"' % (b"x" * 90_000))
    writer.write(chat(acme.key, long) + chat(acme.key)[:60])
    assert (await answered(reader))[0].startswith(b"HTTP/1.1 200")
    writer.write(chat(acme.key)[60:])
    assert (await answered(reader))[0].startswith(b"HTTP/1.1 200")
    writer.close()


async def test_what_follows_a_large_body_waits_unread(run_gateway: RunGateway, run_replica: RunReplica) -> None:
    """A connection reads on while a large body is answered, but no further than one request more."""
    replica = await run_replica()
    gateway = await run_gateway(replica)
    acme = await gateway.tenant("acme")
    replica.faults.latency_s = 1.0
    reader, writer = await connect(gateway)
    long = BODY.replace(b'"x"', b'"%b"' % (b"x" * 900_000))
    writer.write(chat(acme.key, long))
    await until(lambda: replica.in_flight == 1)
    writer.write(chat(acme.key, long) * 4)
    connections: list[Any] = list(gateway.parts.connections)
    (connection,) = [each for each in connections if isinstance(each.cycle, Exchange)]
    await until(lambda: len(connection.pipeline) == 1)
    await asyncio.sleep(0.3)
    assert len(connection.pipeline) == 1
    assert len(connection.cycle.body) <= 256 << 10  # one read
    replica.faults.latency_s = 0.0
    for _ in range(5):
        assert (await answered(reader))[0].startswith(b"HTTP/1.1 200")
    writer.close()


async def test_slow_bodies_of_one_tenant_take_no_more_than_their_room(
    acme: Tenant, globex: Tenant, gateway: Gateway
) -> None:
    """The others wait, unread; another tenant's come at once."""
    size = 1 << 20
    connections = [await connect(gateway) for _ in range(64)]
    for _, writer in connections:
        writer.write(chat(acme.key, b"x" * size)[:-1])

    def held() -> int:
        cycles = [cast(FrontProtocol, each).cycle for each in gateway.parts.connections]
        return sum(len(cycle.body) for cycle in cycles if cycle is not None)

    await until(lambda: held() >= ROOM_BYTES - 32)
    await asyncio.sleep(0.3)
    assert held() <= ROOM_BYTES + 32 * (256 << 10)  # a read of each that waits
    reader, writer = await connect(gateway)
    writer.write(chat(globex.key)[: -len(BODY)])
    await asyncio.sleep(0.05)
    writer.write(BODY)
    assert (await answered(reader))[0].startswith(b"HTTP/1.1 200")
    for _, slow in connections:
        slow.write(b"x")
    heads = [(await answered(slow))[0] for slow, _ in connections]
    assert {head[:12] for head in heads} == {b"HTTP/1.1 400"}
    for _, each in [*connections, (reader, writer)]:
        each.close()


async def test_trailers_without_end_are_cut_off(gateway: Gateway) -> None:
    """A stranger's chunked body may end in fields; they are bounded like a head and kept nowhere."""
    _, writer = await connect(gateway)
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n0\r\n")

    async def send_on() -> None:
        for _ in range(2_000):
            writer.write(b"x-a: " + b"b" * 1_000 + b"\r\n")
            await writer.drain()
            await asyncio.sleep(0)

    with pytest.raises(ConnectionError):
        await send_on()
    writer.close()


async def test_a_key_revoked_while_its_body_comes_is_refused(acme: Tenant, gateway: Gateway) -> None:
    """Whoever sends slowly does not outlive the key."""
    reader, writer = await connect(gateway)
    whole = chat(acme.key)
    writer.write(whole[:-10])
    await writer.drain()
    await asyncio.sleep(0.1)
    (key,) = (await gateway.operator.get("/admin/v1/tenants/acme/keys")).json()["data"]
    assert (await gateway.operator.delete(f"/admin/v1/keys/{key['id']}")).status_code == 204
    writer.write(whole[-10:])
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 401")
    writer.close()


async def test_a_body_larger_than_the_plan_allows_is_not_read(acme: Tenant, gateway: Gateway) -> None:
    """The plan's bound holds while it comes, not once it is here."""
    await gateway.operator.post("/admin/v1/plans", json={"name": "small", "max_prompt_bytes": 1_000})
    await gateway.operator.patch("/admin/v1/tenants/acme", json={"plan": "small"})
    answer = await acme.ask(BASE, messages=[{"role": "user", "content": "x" * 500_000}])
    assert answer.status_code == 413
    assert "1000 bytes" in answer.text


async def test_a_slow_reader_of_a_whole_answer_holds_no_place(run_replica: RunReplica, run_gateway: RunGateway) -> None:
    """The engine is done: others are let in while one client takes its time."""
    replica = await run_replica(max_num_seqs=1, max_model_len=4_096)
    gateway = await run_gateway(replica)
    acme, globex = await gateway.tenant("acme"), await gateway.tenant("globex")
    replica.faults.status = 200
    replica.faults.status_body = (
        b'{"id":"x","object":"chat.completion","model":"base","choices":[{"index":0,"message":{"role":"assistant",'
        b'"content":"' + b"x" * (8 << 20) + b'"},"finish_reason":"stop"}],'
        b'"usage":{"prompt_tokens":1,"total_tokens":2,"completion_tokens":1}}'
    )
    reader, writer = await connect(gateway, 4_096)
    writer.write(chat(acme.key))
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    await until(lambda: all(member.replica.load == 0 for member in gateway.parts.pool.members()))
    replica.faults.status = None
    assert (await globex.ask(BASE)).status_code == 200
    writer.close()


async def test_counting_waits_its_turn(run_replica: RunReplica, run_gateway: RunGateway) -> None:
    """Counts are no way round the gate that keeps an engine from a flood."""
    replica: FakeReplica = await run_replica(max_num_seqs=2)
    gateway = await run_gateway(replica)
    acme = await gateway.tenant("acme")
    (member,) = gateway.parts.pool.members()
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, member.replica.gate.in_flight)
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    counts = await asyncio.gather(
        *(acme.client.post("/v1/tokenize", json={"model": BASE, "prompt": "x"}) for _ in range(40))
    )
    watching.cancel()
    assert {count.status_code for count in counts} == {200}
    assert 1 <= most <= 2


async def test_a_request_for_several_answers_takes_as_many_places(
    run_replica: RunReplica, run_gateway: RunGateway
) -> None:
    """`n` runs as so many sequences in the engine: the gate counts them so."""
    replica = await run_replica(max_num_seqs=4)
    gateway = await run_gateway(replica)
    acme = await gateway.tenant("acme")
    (member,) = gateway.parts.pool.members()
    replica.faults.latency_s = 1.0
    asking = [asyncio.create_task(acme.ask(BASE, n=4)) for _ in range(2)]
    await until(lambda: (member.replica.gate.in_flight, member.replica.gate.waiting) == (4, 1))
    assert {(await task).status_code for task in asking} == {200}
    assert member.replica.gate.in_flight == 0


async def test_a_tenant_whose_requests_fail_trips_no_replica_for_others(
    gateway: Gateway, acme: Tenant, globex: Tenant, good: Path, replica: FakeReplica
) -> None:
    """While others are answered, it is that tenant's requests that fail, not the replica."""
    for _ in range(10):
        assert (await globex.ask(BASE)).status_code == 200
        replica.faults.status = 500
        assert (await acme.ask(BASE)).status_code == 503
        assert (await acme.ask(BASE)).status_code == 503
        replica.faults.status = None
    assert (await globex.ask(BASE)).status_code == 200
    assert [state.value for state in gateway.parts.pool.states().values()] == ["ready"]


@pytest.mark.parametrize("end", ["connection_lost", "expire"])
async def test_a_client_that_leaves_before_its_task_has_begun_leaves_nothing_behind(
    acme: Tenant, gateway: Gateway, end: str
) -> None:
    """A cancelled task that has not begun runs nothing of its own: the request is settled all the same."""
    protocol = protocol_of(gateway.front)
    protocol.data_received(chat("sk-tailor-" + "0" * 43))  # unknown: the database is asked
    assert protocol.tasks
    call: Callable[[], None] = protocol.expire if end == "expire" else lambda: protocol.connection_lost(None)
    asyncio.get_running_loop().call_soon(call)  # behind the batch, before the task that it makes
    await until(lambda: not protocol.tasks)
    assert "tailor_in_flight_requests 0" in (await gateway.parts.metrics.page()).decode()
    if end == "expire":
        protocol.connection_lost(None)
