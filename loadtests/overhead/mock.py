"""A cheap upstream that speaks vLLM's streaming dialect and the agent's routes, for measuring what sits before it.

    python -m loadtests.overhead.mock --port 9100 --fingerprint HEX

GET   /v1/models, /tailor/state   small JSON; every adapter that was loaded is resident
GET   /stats                      {"aborted": streams left before their end, "traces": exports of traces received}
PUT   /tailor/adapters/NAME       loaded at once; POST /tailor/probe answers at once
POST  /v1/traces                  taken and counted, so that a tracing gateway has somewhere to export to
POST  anything else               a completion; `stream`, `max_tokens` (chunks) and `seed` (µs between them) are read

Every chunk carries its send time, so that the reader can tell how late it came. Streams of equal step emit in lockstep,
as one engine step of a batch does. With `continuous_usage_stats` each chunk carries the usage so far, as in vLLM 0.32.
"""

import argparse
import asyncio
import hashlib
import json
import re
import time
from dataclasses import dataclass, field
from typing import Any, Final, cast

import uvloop

now = time.monotonic_ns
LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
STREAM: Final = re.compile(rb'"stream" *: *true')
USAGE: Final = re.compile(rb'"include_usage" *: *true')
RUNNING_USAGE: Final = re.compile(rb'"continuous_usage_stats" *: *true')
CHUNKS: Final = re.compile(rb'"max_(?:completion_)?tokens" *: *(\d+)')
STEP: Final = re.compile(rb'"seed" *: *(\d+)')
MODEL: Final = re.compile(rb'"model" *: *"([^"]+)"')

PROMPT_TOKENS: Final = 12
DEFAULT_CHUNKS: Final = 64
OK: Final = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b"
STREAM_HEAD: Final = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
)
EVENT_HEAD: Final = (
    b'data: {"id":"chatcmpl-mock","object":"chat.completion.chunk","created":1700000000,"model":"%b","choices":['
)
TOKEN_HEAD: Final = EVENT_HEAD + b'{"index":0,"delta":{"content":"@'
TOKEN_TAIL: Final = b' "},"logprobs":null,"finish_reason":null}]'
STOP: Final = EVENT_HEAD + b'{"index":0,"delta":{"content":""},"logprobs":null,"finish_reason":"stop"}]%b}\n\n'
LAST_USAGE: Final = EVENT_HEAD + b"]%b}\n\n"
USED: Final = b',"usage":{"prompt_tokens":12,"total_tokens":%d,"completion_tokens":%d}'
DONE: Final = b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
CHAT: Final = (
    b'{"id":"chatcmpl-mock","object":"chat.completion","created":1700000000,"model":"%b","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"' + b"The quick brown fox rests." * 3 + b'"},'
    b'"logprobs":null,"finish_reason":"stop"}],'
    b'"usage":{"prompt_tokens":12,"total_tokens":28,"completion_tokens":16}}'
)


def whole(value: object) -> bytes:
    """A JSON answer with its head."""
    body = json.dumps(value, separators=(",", ":")).encode()
    return OK % (len(body), body)


def chunked(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def usage(tokens: int) -> bytes:
    """The member as vLLM writes it after `choices`."""
    return USED % (PROMPT_TOKENS + tokens, tokens)


@dataclass
class Engine:
    """What the agent would tell of this replica, and what was seen."""

    fingerprint: str
    adapters: dict[str, dict[str, object]] = field(default_factory=dict)
    aborted: int = 0
    traces: int = 0

    def state(self) -> dict[str, object]:
        """`GET /tailor/state`."""
        return {
            "generation": "mock1",
            "base_model": {"name": "mock", "fingerprint": self.fingerprint},
            "engine": {
                "version": "mock",
                "device": "cuda",
                "max_loras": 64,
                "max_cpu_loras": 4_096,
                "max_lora_rank": 64,
                "max_model_len": 131_072,
            },
            "null_adapter": None,
            "adapters": list(self.adapters.values()),
            "loads": {"count": len(self.adapters), "seconds": 0.0},
            "corrupted_requests": 0,
        }

    def load(self, name: str, body: bytes) -> dict[str, object]:
        """`PUT /tailor/adapters/{name}`; the digest is the gateway's: over the two files' own."""
        asked: dict[str, Any] = json.loads(body)
        hashes = "".join(f"{file['sha256']}\n" for file in sorted(asked["files"], key=lambda file: file["name"]))
        self.adapters[name] = {
            "name": name,
            "owner": asked["owner"],
            "digest": hashlib.sha256(hashes.encode()).hexdigest(),
            "tier": "gpu",
            "bytes": sum(file["bytes"] for file in asked["files"]),
            "last_used": time.time(),
        }
        return {"name": name, "tier": "gpu", "fetch_s": 0.0, "load_s": 0.0}


class Ticker:
    """Emits one chunk on every stream of one step length, together."""

    def __init__(self) -> None:
        self._groups: dict[int, set[MockProtocol]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, step_ns: int, stream: "MockProtocol") -> None:
        if step_ns not in self._groups:
            self._groups[step_ns] = set()
            task = asyncio.get_running_loop().create_task(self._run(step_ns))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        self._groups[step_ns].add(stream)

    async def _run(self, step_ns: int) -> None:
        group, due = self._groups[step_ns], 0
        while group:
            # the loop's timers may fire up to a millisecond early: never the same tick twice
            due = max(due + step_ns, (now() // step_ns + 1) * step_ns)
            await asyncio.sleep((due - now()) / 1e9)
            group -= {stream for stream in list(group) if stream.emit()}
        del self._groups[step_ns]


class MockProtocol(asyncio.Protocol):
    """One connection; `_left` counts the chunks that its running stream still owes."""

    def __init__(self, engine: Engine, ticker: Ticker) -> None:
        self._engine, self._ticker = engine, ticker
        self._buffer, self._left, self._sent = b"", None, 0
        self._model, self._usage, self._running_usage = b"", False, False
        self._head = b""

    _left: int | None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._left is not None:
            self._engine.aborted += 1
            self._left = -1

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        while (cut := self._buffer.find(b"\r\n\r\n")) >= 0:
            head = self._buffer[: cut + 2]
            found = LENGTH.search(head)
            end = cut + 4 + (int(found[1]) if found else 0)
            if len(self._buffer) < end:
                return
            body, self._buffer = self._buffer[cut + 4 : end], self._buffer[end:]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        method, path, _ = head.split(b" ", 2)
        if method == b"POST" and path.startswith(b"/v1/") and path != b"/v1/traces":
            self._generate(body)
        else:
            self._transport.write(self._control(method.decode(), path.decode(), body))

    def _control(self, method: str, path: str, body: bytes) -> bytes:
        engine = self._engine
        name = path.rpartition("/")[2]
        if path == "/tailor/state":
            return whole(engine.state())
        if path == "/stats":
            return whole({"aborted": engine.aborted, "traces": engine.traces})
        if path == "/v1/traces":
            engine.traces += 1
            return whole({})
        if path == "/v1/models":
            return whole({"object": "list", "data": [{"id": "mock", "object": "model", "owned_by": "vllm"}]})
        if path == "/tailor/probe":
            return whole({"latency_s": 0.0})
        if path.startswith("/tailor/adapters/") and method == "PUT":
            return whole(engine.load(name, body))
        if path.startswith("/tailor/adapters/") and method == "DELETE":
            engine.adapters.pop(name, None)
            return b"HTTP/1.1 204 No Content\r\n\r\n"
        return whole({})

    def _generate(self, body: bytes) -> None:
        found = MODEL.search(body)
        self._model = found[1] if found else b"mock"
        if STREAM.search(body) is None:
            text = CHAT % self._model
            self._transport.write(OK % (len(text), text))
            return
        chunks, step = CHUNKS.search(body), STEP.search(body)
        self._left, self._sent = (int(chunks[1]) if chunks else DEFAULT_CHUNKS), 0
        self._head = TOKEN_HEAD % self._model
        self._usage, self._running_usage = bool(USAGE.search(body)), bool(RUNNING_USAGE.search(body))
        self._transport.write(STREAM_HEAD)
        if step and int(step[1]):
            self._ticker.add(int(step[1]) * 1_000, self)
        else:
            while not self.emit():
                pass

    def emit(self) -> bool:
        """One chunk; True once the stream has ended."""
        if self._left is None or self._left < 0:
            return True
        running = usage(self._sent + 1) if self._running_usage else b""
        if self._left:
            self._left -= 1
            self._sent += 1
            stamp = b"%d" % now()
            size = len(self._head) + len(stamp) + len(TOKEN_TAIL) + len(running) + 3
            self._transport.write(b"%x\r\n%b%b%b%b}\n\n\r\n" % (size, self._head, stamp, TOKEN_TAIL, running))
            return False
        self._left = None
        stop = STOP % (self._model, usage(self._sent) if self._running_usage else b"")
        last = chunked(LAST_USAGE % (self._model, usage(self._sent))) if self._usage else b""
        self._transport.write(chunked(stop) + last + DONE)
        return True


async def listen(engine: Engine, port: int = 0) -> asyncio.Server:
    """Answer on 127.0.0.1; port 0 takes a free one."""
    ticker = Ticker()
    loop = asyncio.get_running_loop()
    return await loop.create_server(lambda: MockProtocol(engine, ticker), "127.0.0.1", port, backlog=1_024)


async def serve(port: int, fingerprint: str) -> None:
    """Answer until cancelled."""
    await (await listen(Engine(fingerprint), port)).serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--port", type=int, default=9_100)
    parser.add_argument("--fingerprint", default="mock", help="of the base model that /tailor/state claims to serve")
    args = parser.parse_args()
    uvloop.run(serve(args.port, args.fingerprint))


if __name__ == "__main__":
    main()
