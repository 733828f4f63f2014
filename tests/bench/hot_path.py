"""CPU of the gateway's own code per request and per chunk, without sockets: what a change of the hot path costs.

    python -m tests.bench.hot_path [--profile]

A real app, protocol and upstream connection; only the transports are none. The engine's answer is there at once. The
least of many batches is the figure: it moves little on a shared machine. `--profile` prints where the time goes.
"""

import argparse
import asyncio
import cProfile
import json
import pstats
import sys
import tempfile
import time
from pathlib import Path

import uvloop
from pydantic import SecretStr

from gateway.app import create_app
from gateway.front import Front
from gateway.replicas.upstream import Connection, Upstream
from gateway.settings import Settings
from loadtests.fake.replica import TOKEN, FakeReplica
from tests.bad_adapters import write_base
from tests.fakes.transport import Nowhere, protocol_of

BATCH = 500
BATCHES = 12
CHUNKS = 64
PLAN = {
    "name": "all",
    "requests_per_minute": 10**9,
    "tokens_per_minute": 10**12,
    "concurrent_requests": 10**6,
    "max_output_tokens": 10**5,
    "tokens_per_month": 10**15,
    "loads_per_minute": 10**6,
}
EVENT = (
    b'data: {"id":"chatcmpl-1","object":"chat.completion.chunk","created":1700000000,"model":"base",'
    b'"choices":[{"index":0,"delta":{"content":"token"},"logprobs":null,"finish_reason":null}],'
    b'"usage":{"prompt_tokens":12,"total_tokens":20,"completion_tokens":8}}\n\n'
)
WHOLE = (
    b'{"id":"chatcmpl-1","object":"chat.completion","created":1700000000,"model":"base","choices":[{"index":0,"message":'
    b'{"role":"assistant","content":"The quick brown fox rests. The quick brown fox rests."},"logprobs":null,'
    b'"finish_reason":"stop"}],"usage":{"prompt_tokens":12,"total_tokens":76,"completion_tokens":64}}'
)
ANSWER = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
    len(WHOLE),
    WHOLE,
)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)


class Engine:
    """Answers on real connections what it is told to."""

    def __init__(self) -> None:
        self.streams = False
        self.open: Connection | None = None

    def connect(self, upstream: Upstream) -> None:
        """Give the upstream a connection that it takes for an idle one."""
        connection = Connection()
        connection.upstream = upstream
        loop = asyncio.get_running_loop()

        def write(_: bytes) -> None:
            if self.streams:
                self.open = connection
                loop.call_soon(connection.data_received, STREAM_HEAD)
            else:
                loop.call_soon(connection.data_received, ANSWER)

        connection.connection_made(Nowhere(write))
        connection.idle_since = loop.time()
        upstream._idle.append(connection)


class Client:
    """One connection to the gateway."""

    def __init__(self, front: Front, key: str) -> None:
        self.answered: asyncio.Future[bytes] | None = None
        self.streamed = 0
        self._key = key.encode()
        self.protocol = protocol_of(front, self._take)

    def request(self, **more: object) -> bytes:
        messages = [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Say something short about foxes."},
        ]
        body = json.dumps({"model": "base", "messages": messages, "temperature": 0.7, **more}).encode()
        return (
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1:8000\r\nauthorization: Bearer %b\r\n"
            b"content-type: application/json\r\naccept: */*\r\ncontent-length: %d\r\n\r\n%b"
        ) % (self._key, len(body), body)

    async def ask(self, data: bytes) -> bytes:
        self.answered = asyncio.get_running_loop().create_future()
        self.protocol.data_received(data)
        return await self.answered

    def _take(self, data: bytes) -> None:
        if self.answered is not None and not self.answered.done():
            self.answered.set_result(data)
        else:
            self.streamed += 1


def least(samples: list[float]) -> float:
    """Of many batches, in µs: what the code costs when nobody disturbs it."""
    return round(min(samples), 2)


async def per_request(client: Client) -> float:
    data = client.request()
    answer = await client.ask(data)
    assert answer.startswith(b"HTTP/1.1 200"), answer
    samples = []
    for _ in range(BATCHES):
        begin = time.process_time()
        for _ in range(BATCH):
            await client.ask(data)
        samples.append((time.process_time() - begin) / BATCH * 1e6)
    return least(samples)


async def per_chunk(client: Client, engine: Engine) -> float:
    engine.streams = True
    data = client.request(stream=True, max_tokens=200)
    chunk = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
    asked = asyncio.ensure_future(client.ask(data))
    while engine.open is None:
        assert not asked.done(), asked.result()
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    engine.open.data_received(chunk)
    head = await asked
    assert head.startswith(b"HTTP/1.1 200"), head
    samples = []
    for _ in range(BATCHES):
        begin = time.process_time()
        for _ in range(BATCH * 4):
            engine.open.data_received(chunk)
        samples.append((time.process_time() - begin) / (BATCH * 4) * 1e6)
    return least(samples)


async def measure(profile: bool) -> None:
    with tempfile.TemporaryDirectory(prefix="tailor-hot-path-") as name:
        folder = Path(name)
        base = write_base(folder / "base")
        front = await _started(folder, base)
        key = await _key(front)
        engine = Engine()
        for member in front.parts.pool.members():
            upstream = member.replica.client.upstream
            upstream.close()
            engine.connect(upstream)
        client = Client(front, key)
        profiler = cProfile.Profile() if profile else None
        if profiler is not None:
            await client.ask(client.request())
            profiler.enable()
        request_us = await per_request(client)
        if profiler is not None:
            profiler.disable()
            pstats.Stats(profiler).sort_stats("tottime").print_stats(45)
        chunk_us = await per_chunk(client, engine)
        sys.stdout.write(json.dumps({"request_us": request_us, "chunk_us": chunk_us}) + "\n")
        sys.stdout.flush()
        import os

        os._exit(0)


async def _started(folder: Path, base: Path) -> Front:
    from adapter_store.base_model import BaseModel

    replica = FakeReplica(BaseModel.read(base).fingerprint, base_name="base")
    await replica.start()
    settings = Settings(
        _env_file=None,
        home=folder / "home",
        base_model=str(base),
        replicas=(replica.url,),
        replica_token=SecretStr(TOKEN),
        operator_port=0,
        probe_interval_s=600,
        proof="off",
    )
    front = create_app(settings)
    lifespan = front._app._app.router.lifespan_context(front._app._app)  # type: ignore[attr-defined]
    await lifespan.__aenter__()
    while not any(state.value == "ready" for state in front.parts.pool.states().values()):
        await asyncio.sleep(0.05)
    return front


async def _key(front: Front) -> str:
    from gateway.plans import Plan
    from gateway.tenants import TENANT_SCOPES

    parts = front.parts
    await parts.plans.create(Plan(**PLAN))  # type: ignore[arg-type]
    tenant = await parts.tenants.create("acme", plan="all")
    _, secret = await parts.keys.create(tenant.id, TENANT_SCOPES, maker=None)
    return secret


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true")
    uvloop.run(measure(parser.parse_args().profile))


if __name__ == "__main__":
    main()
