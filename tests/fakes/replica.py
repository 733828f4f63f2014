"""A fake replica: vLLM's HTTP dialect and the agent's, over a real socket, with faults to order.

Its answer names the adapter's digest, so that a wrong adapter is seen exactly. In every test it asserts what the engine
needs (`violations` stays empty): a name is used once, nothing is loaded in place.
"""

import asyncio
import json
import secrets
from dataclasses import dataclass, field
from typing import Any

from adapter_store.bundle import CONFIG_FILE, WEIGHTS_FILE, bundle_digest

TOKEN = "fake-replica-token-0123456789"


@dataclass
class Faults:
    """What goes wrong; a test sets what it needs."""

    die_after_events: int | None = None
    error_event_after: int | None = None
    garble_after: int | None = None
    hang_before_answer: bool = False
    head_then_nothing: bool = False
    probe_hangs: bool = False
    load_status: int | None = None
    load_delay_s: float = 0.0
    forget_after_load: bool = False
    status: int | None = None
    status_body: bytes = b'{"error":{"message":"internal /secret/path a-0000","code":500}}'
    event_delay_s: float = 0.0


@dataclass
class FakeReplica:
    """Serves on 127.0.0.1; `port` is known after `start`."""

    fingerprint: str
    base_name: str = "tiny-base"
    capacity: int = 32
    null_adapter: str | None = None
    max_model_len: int = 256
    events: int = 4
    faults: Faults = field(default_factory=Faults)
    generation: str = field(default_factory=lambda: secrets.token_hex(8))
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    used_names: set[str] = field(default_factory=set)
    requests: list[dict[str, Any]] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    cancelled: int = 0
    connections: int = 0
    violations: list[str] = field(default_factory=list)
    port: int = 0
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """As kill -9 does: every connection is cut."""
        if self._server is not None:
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            await self._server.wait_closed()
            self._server = None

    async def restart(self) -> None:
        """A new engine at the same address, which knows no adapter."""
        await self.stop()
        self.generation = secrets.token_hex(8)
        self.adapters.clear()
        self.used_names.clear()
        await self.start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                method, path, _ = lines[0].split(" ")
                headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
                body = await reader.readexactly(int(headers.get("content-length", "0")))
                await self._answer(method, path, headers, body, reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        if path == "/health":
            return self._json(writer, 200, {})
        if headers.get("authorization") != f"bearer {TOKEN}".lower():
            return self._json(writer, 401, {"error": {"code": "token_invalid"}})
        if path == "/tailor/state":
            return self._json(writer, 200, self._state())
        if path == "/tailor/probe":
            if self.faults.probe_hangs:
                await asyncio.sleep(3_600)
            return self._json(writer, 200, {"latency_s": 0.001})
        if path.startswith("/tailor/adapters/"):
            return await self._adapter(method, path.rsplit("/", 1)[1], body, writer)
        return await self._generate(path, headers, json.loads(body), reader, writer)

    def _state(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "base_model": {"name": self.base_name, "fingerprint": self.fingerprint},
            "engine": {
                "version": "fake",
                "device": "cpu",
                "max_loras": 4,
                "max_cpu_loras": self.capacity,
                "max_lora_rank": 64,
                "max_model_len": self.max_model_len,
            },
            "null_adapter": self.null_adapter,
            "adapters": list(self.adapters.values()),
            "loads": {"count": len(self.loads), "seconds": 0.0},
            "corrupted_requests": 0,
        }

    async def _adapter(self, method: str, name: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if method == "DELETE":
            known = self.adapters.pop(name, None)
            self._json(writer, 204 if known else 404, {} if known else {"error": {"code": "adapter_unknown"}})
            return
        if name in self.used_names:
            self.violations.append(f"name {name} used again")
        self.used_names.add(name)
        await asyncio.sleep(self.faults.load_delay_s)
        if self.faults.load_status is not None:
            self._json(writer, self.faults.load_status, {"error": {"code": "load_failed"}})
            return
        asked = json.loads(body)
        self.loads.append(name)
        hashes = {file["name"]: file["sha256"] for file in asked["files"]}
        digest = bundle_digest(hashes[CONFIG_FILE], hashes[WEIGHTS_FILE])
        if not self.faults.forget_after_load:
            self.adapters[name] = {
                "name": name,
                "tier": "gpu",
                "bytes": 1,
                "last_used": 0.0,
                "owner": asked["owner"],
                "digest": digest,
            }
        self._json(writer, 200, {"name": name, "tier": "gpu", "fetch_s": 0.0, "load_s": 0.0})

    async def _generate(
        self,
        path: str,
        headers: dict[str, str],
        body: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.requests.append({"path": path, "headers": headers, "body": body})
        name = headers.get("x-tailor-adapter")
        if name is not None and name != self.null_adapter and name not in self.adapters:
            return self._json(writer, 404, {"error": {"code": "adapter_unknown"}})
        if self.faults.hang_before_answer:
            await reader.read()  # until the client goes away
            self.cancelled += 1
            return None
        if self.faults.head_then_nothing:
            if "logit_bias" in body:  # as an API server refuses without asking its engine
                return self._json(writer, 400, {"error": {"message": "no such token"}})
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
            await reader.read()
            self.cancelled += 1
            return None
        if self.faults.status is not None:
            return self._bytes(writer, self.faults.status, self.faults.status_body)
        text = self.text_of(name)
        if body.get("stream"):
            await self._stream(body, text, reader, writer)
            return None
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 3, "completion_tokens": self.events, "total_tokens": 3 + self.events}
        answer = {"id": "x", "object": "chat.completion", "created": 1, "model": body["model"]}
        return self._json(writer, 200, {**answer, "choices": [choice], "usage": usage})

    def text_of(self, name: str | None) -> str:
        """What an adapter answers; the base has its own words."""
        return f"I am {self.adapters[name]['digest']}" if name in self.adapters else "I am the base"

    async def _stream(
        self, body: dict[str, Any], text: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        gone = asyncio.ensure_future(reader.read())
        pieces = [text, *("." * (self.events - 1))]
        for number, piece in enumerate(pieces):
            if await self._fault(number, writer):
                gone.cancel()
                return
            self._event(writer, body["model"], [{"index": 0, "delta": {"content": piece}, "finish_reason": None}])
            await asyncio.sleep(self.faults.event_delay_s)
            if gone.done():
                self.cancelled += 1
                return
        usage = {"prompt_tokens": 3, "completion_tokens": self.events, "total_tokens": 3 + self.events}
        self._event(writer, body["model"], [{"index": 0, "delta": {}, "finish_reason": "stop"}])
        self._event(writer, body["model"], [], usage=usage)
        self._chunk(writer, b"data: [DONE]\n\n")
        writer.write(b"0\r\n\r\n")
        gone.cancel()

    async def _fault(self, number: int, writer: asyncio.StreamWriter) -> bool:
        """True where the stream has ended by a fault."""
        if number == self.faults.error_event_after:
            self._chunk(writer, b'data: {"error":{"message":"CUDA error at /opt/vllm","code":500}}\n\n')
            self._chunk(writer, b"data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")
            return True
        if number == self.faults.garble_after:
            writer.write(b"zzz\r\nnot a chunk\r\n")
            return True
        if number == self.faults.die_after_events:
            writer.write(b'10\r\ndata: {"id":"ha')  # half an event
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.transport.abort()
            return True
        return False

    def _event(self, writer: asyncio.StreamWriter, model: str, choices: list[dict[str, Any]], **more: object) -> None:
        event = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": choices}
        self._chunk(writer, f"data: {json.dumps({**event, **more}, separators=(',', ':'))}\n\n".encode())

    @staticmethod
    def _chunk(writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _json(self, writer: asyncio.StreamWriter, status: int, value: object) -> None:
        self._bytes(writer, status, json.dumps(value, separators=(",", ":")).encode())

    @staticmethod
    def _bytes(writer: asyncio.StreamWriter, status: int, body: bytes) -> None:
        content = b"" if status == 204 else body
        length = b"" if status == 204 else b"content-length: %d\r\n" % len(content)
        writer.write(b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\n%b\r\n%b" % (status, length, content))
