"""Random bodies through the socket: no 5xx, and what reaches the engine has allowed fields within bounds only.

The ordinary run sends some hundred; `-m full` sends 20,000.
"""

import asyncio
import copy
import json
import random
import re
import string
from collections import Counter
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from gateway.dialects.fields import GATEWAY_SET, OPT_IN, REFUSED
from loadtests.fake.replica import FakeReplica
from tests.integration.gateway.conftest import BASE, Gateway, Tenant

SAMPLING: Final = {
    "model", "cache_salt", "stream", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids",
    "frequency_penalty", "presence_penalty", "repetition_penalty", "logit_bias",
}  # fmt: skip
CHAT: Final = SAMPLING | {"max_tokens", "min_tokens", "n", "stream_options", "response_format"}
TOOLS: Final = {"tools", "tool_choice", "parallel_tool_calls"}
ALLOWED: Final = {
    "/v1/chat/completions": CHAT | TOOLS | {"messages", "logprobs", "top_logprobs"},
    "/v1/completions": CHAT | {"prompt", "logprobs"},
    "/v1/responses": SAMPLING
    | TOOLS
    | {"input", "instructions", "max_output_tokens", "include", "store", "text", "top_logprobs"},
    "/v1/messages": {
        "model", "cache_salt", "stream", "messages", "system", "max_tokens", "stop_sequences", "temperature", "top_k",
        "top_p", "tools", "tool_choice", "output_config", "thinking",
    },
    "/v1/messages/count_tokens": {
        "model", "messages", "system", "tools", "tool_choice", "output_config", "thinking",
    },
    "/tokenize": {"model", "messages", "prompt", "tools", "add_special_tokens"},
}  # fmt: skip
"""What may reach the engine, written here a second time on purpose."""
INSIDE: Final = {
    "annotations", "arguments", "call_id", "content", "description", "disable_parallel_tool_use", "format", "function",
    "id", "include_usage", "continuous_usage_stats", "input", "input_schema", "is_error", "json_schema", "name",
    "output", "parameters", "reasoning", "reasoning_content", "refusal", "role", "schema", "signature", "strict",
    "text", "thinking", "tool_call_id", "tool_calls", "tool_use_id", "type",
}  # fmt: skip
"""Names of members inside those fields, but for what is a client's own: schemas, arguments, biases."""
CLIENTS_OWN: Final = {"parameters", "input_schema", "schema", "logit_bias"}
HEADERS: Final = {
    "host", "authorization", "content-type", "content-length", "x-request-id", "x-vllm-priority", "x-tailor-adapter",
    "accept",
}  # fmt: skip

SAID: Final = [{"role": "user", "content": "hello"}]
SCHEMA: Final = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
SEEDS: Final[dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {"messages": SAID},
    "/v1/completions": {"prompt": "hello"},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": SAID, "max_tokens": 4},
    "/v1/messages/count_tokens": {"messages": SAID},
    "/v1/responses/input_tokens": {"input": "hello"},
    "/v1/tokenize": {"messages": SAID},
}
TEXT: Final = {"type": "text", "text": "t"}
NAMED: Final = {"name": "s", "schema": SCHEMA}
ANTHROPICS: Final = {"name": "f", "input_schema": SCHEMA}
FUNCTION: Final = {"name": "f", "parameters": SCHEMA}
PLAUSIBLE: Final[dict[str, list[Any]]] = {
    "frequency_penalty": [0, -2.0, 2],
    "include": [[], ["message.output_text.logprobs"]],
    "input": ["hi", SAID, [{"type": "function_call_output", "call_id": "c", "output": "x"}]],
    "instructions": ["be brief", None],
    "logit_bias": [{"5": 1.0}, {}],
    "logprobs": [True, 1, None],
    "max_completion_tokens": [1, 4096, 1 << 31],
    "max_output_tokens": [1, 4096],
    "max_tokens": [1, 16, 4096, 1 << 31],
    "messages": [SAID, [{"role": "system", "content": "s"}, *SAID], [{"role": "user", "content": [TEXT]}]],
    "metadata": [{"a": "b"}, {"user_id": "u"}],
    "min_p": [0, 0.5],
    "min_tokens": [0, 1],
    "n": [1, 4, 5],
    "parallel_tool_calls": [True],
    "presence_penalty": [1],
    "prompt": ["hi", [1, 2, 3]],
    "repetition_penalty": [1.1],
    "response_format": [{"type": "json_object"}, {"type": "json_schema", "json_schema": NAMED}],
    "seed": [0, (1 << 63) - 1],
    "service_tier": ["auto"],
    "stop": ["x", ["x", "y"]],
    "stop_sequences": [["x"]],
    "store": [True],
    "stream": [True, False],
    "stream_options": [{"include_usage": True}],
    "system": ["be brief", [{"type": "text", "text": "t", "cache_control": {"type": "ephemeral"}}]],
    "temperature": [0, 1, 2.0],
    "text": [{"format": {"type": "json_schema", "name": "s", "schema": SCHEMA}}, {"verbosity": "medium"}],
    "thinking": [{"type": "disabled"}],
    "tool_choice": ["none", "required", {"type": "function", "function": {"name": "f"}}, {"type": "tool", "name": "f"}],
    "tools": [[{"type": "function", "function": FUNCTION}], [{"type": "function", **FUNCTION}], [ANTHROPICS]],
    "top_k": [-1, 0, 40],
    "top_logprobs": [0, 5],
    "top_p": [0.5, 1],
    "user": ["u"],
}  # fmt: skip
WORDS: Final = (
    *PLAUSIBLE,
    *GATEWAY_SET,
    *OPT_IN,
    *REFUSED,
    "",
    "\0",
    "__proto__",
    "api_key",
    "prompt_embeds",
    "é",
    "\ud800",
)
ODD: Final[tuple[Any, ...]] = (
    None, True, False, 0, -1, 1.5, 1e308, 1 << 63, -(1 << 63) - 1, 1 << 200, "", "\0", "\ud83d", "x" * 300, [], {},
    [[]], [None], {"a": {}}, float("nan"), float("inf"), "a-0000", "../../etc/passwd", "' OR 1=1 --",
)  # fmt: skip


class Bodies:
    """Bodies from a seed: mostly a valid one with a few fields changed, now and then bytes that are no JSON."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def next(self) -> tuple[str, bytes]:
        pick = self._random
        path = pick.choice(list(SEEDS))
        body: Any = {
            "model": pick.choice([*[BASE] * 4, *["bot"] * 4, "gone", "a-0123456789abcdef"]),
            **copy.deepcopy(SEEDS[path]),
        }
        fitting = [name for name in PLAUSIBLE if name in ALLOWED.get(path, ALLOWED["/tokenize"])]
        for _ in range(pick.choice([0, 1, 1, 2, 3, 6])):
            name = pick.choice(fitting) if pick.random() < 0.8 else pick.choice(WORDS)
            body[name] = self._value(name)
        if pick.random() < 0.15:
            self._spoil_inside(body)
        if pick.random() < 0.03:
            body = self._json(3)
        return path, self._spoil(json.dumps(body, ensure_ascii=pick.random() < 0.5).encode("utf-8", "surrogatepass"))

    def _value(self, name: str) -> Any:
        if name in PLAUSIBLE and self._random.random() < 0.85:
            return copy.deepcopy(self._random.choice(PLAUSIBLE[name]))
        return self._json(2)

    def _json(self, depth: int) -> Any:
        pick = self._random
        kind = pick.random()
        if depth == 0 or kind < 0.6:
            return copy.deepcopy(pick.choice(ODD))
        if kind < 0.8:
            return [self._json(depth - 1) for _ in range(pick.randrange(4))]
        return {pick.choice(WORDS): self._json(depth - 1) for _ in range(pick.randrange(4))}

    def _spoil_inside(self, body: dict[str, Any]) -> None:
        """A member too many, or another value, somewhere below."""
        node: Any = body
        while True:
            inner = [
                value
                for value in (node.values() if isinstance(node, dict) else node)
                if value and isinstance(value, dict | list)
            ]
            if not inner or (node is not body and self._random.random() < 0.4):
                break
            node = self._random.choice(inner)
        if isinstance(node, dict) and node is not body:
            node[self._random.choice(WORDS)] = self._json(1)
        elif isinstance(node, list):
            node.append(self._json(1))

    def _spoil(self, data: bytes) -> bytes:
        pick = self._random
        kind = pick.random()
        if kind < 0.03:
            return data[: pick.randrange(len(data))]
        if kind < 0.05:
            at = pick.randrange(len(data))
            return data[:at] + bytes([pick.randrange(256)]) + data[at + 1 :]
        if kind < 0.06:
            return b"[" * pick.choice([100, 5_000]) + data
        if kind < 0.07:
            return pick.randbytes(40)
        if kind < 0.08:
            return data[:-1] + b',"model":"' + pick.choice([b"bot", b"a-00"]) + b'","priority":-1}'
        return data


def evil_headers(pick: random.Random) -> dict[str, str]:
    """Headers that mean something to an engine or its agent."""
    given = {
        "x-vllm-priority": "-1000",
        "x-tailor-adapter": "a-0000",
        "x-data-parallel-rank": "0",
        "x-session-id": "s",
        "x-request-id": "".join(pick.choices(string.printable.strip(), k=20)),
        "traceparent": "00-zz-zz-01",
        "x-forwarded-for": "10.0.0.1",
    }
    return {name: value for name, value in given.items() if pick.random() < 0.2}


async def send_random(acme: Tenant, count: int, seed: int) -> Counter[int]:
    """So many random bodies, eight at a time."""
    statuses: Counter[int] = Counter()
    bodies, pick = Bodies(seed), random.Random(seed)
    left = iter(range(count))

    async def work() -> None:
        for _ in left:
            path, body = bodies.next()
            answer = await acme.client.post(path, content=body, headers=evil_headers(pick))
            statuses[answer.status_code] += 1
            assert answer.status_code < 500, (path, body, answer.text)
            assert "a-0000" not in answer.headers.get("x-tailor-adapter", "")
            if answer.status_code != 200:
                _hold_envelope(path, answer)

    await asyncio.gather(*(work() for _ in range(8)))
    return statuses


def _hold_envelope(path: str, answer: httpx.Response) -> None:
    told = answer.json()
    members = {"type", "message"} if path.startswith("/v1/messages") else {"message", "type", "param", "code"}
    assert set(told["error"]) == members
    assert len(told["error"]["message"]) < 600


def hold_upstream(replica: FakeReplica) -> None:
    """Everything that the engine was sent is of the allowed kind."""
    salts = set()
    for request in replica.requests:
        path, body = request["path"], request["body"]
        assert set(body) <= ALLOWED[path], (path, set(body) - ALLOWED[path])
        assert set(request["headers"]) <= HEADERS, set(request["headers"]) - HEADERS
        assert request["headers"].get("x-vllm-priority", "0") != "-1000"
        assert body["model"] == BASE or body["model"] in replica.used_names
        assert body.get("max_tokens", 0) <= replica.max_model_len
        assert body.get("max_output_tokens", 0) <= replica.max_model_len
        assert body.get("n", 1) <= 4
        assert body.get("add_special_tokens", True) is True  # the gateway's own word
        if "tokenize" not in path and "count" not in path:
            salts.add(body["cache_salt"])
        _hold_inside({name: value for name, value in body.items() if name != "model"}, top=True)
    assert len(salts) == 1
    assert re.fullmatch("[0-9a-f]{64}", salts.pop())


def _hold_inside(node: Any, *, top: bool = False) -> None:
    if isinstance(node, list):
        for value in node:
            _hold_inside(value)
    elif isinstance(node, dict):
        assert top or node.keys() <= INSIDE, node.keys() - INSIDE
        for name, value in node.items():
            if name not in CLIENTS_OWN and not (node.get("type") == "tool_use" and name == "input"):
                _hold_inside(value)


async def run_random(gateway: Gateway, acme: Tenant, good: Path, replica: FakeReplica, count: int) -> Counter[int]:
    await acme.publish(good)
    statuses = Counter[int]()
    for batch in range(0, count, 500):
        statuses += await send_random(acme, min(500, count - batch), seed=batch)
        hold_upstream(replica)
        replica.requests.clear()
        replica.served.clear()
    assert (await acme.ask()).status_code == 200
    return statuses


async def test_random_bodies_end_in_no_server_error(
    gateway: Gateway, acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    """And the engine is sent nothing that is not allowed; enough of them pass to show it."""
    statuses = await run_random(gateway, acme, good, replica, 500)
    assert statuses[200] > 80
    assert statuses[400] > 100


async def test_no_refused_field_reaches_the_engine(acme: Tenant, replica: FakeReplica) -> None:
    """Each field that is the gateway's, the operator's to allow or nobody's, with a value of each kind, is a 400."""
    for path, seed in SEEDS.items():
        for name in sorted({*GATEWAY_SET, *OPT_IN, *REFUSED} - {"model"}):
            for value in (True, 1, "x", [1], ["x"], {"enable_thinking": True}):
                answer = await acme.client.post(path, json={"model": BASE, **seed, name: value})
                assert answer.status_code == 400, f"{path} {name} {value}"
                assert name in answer.json()["error"]["message"], answer.text
    assert replica.requests == []
    for path, seed in SEEDS.items():
        assert (await acme.client.post(path, json={"model": BASE, **seed})).status_code == 200, path


@pytest.mark.full
@pytest.mark.timeout(3_600)
async def test_random_bodies_end_in_no_server_error_at_full_size(
    gateway: Gateway, acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    """20,000 of them."""
    statuses = await run_random(gateway, acme, good, replica, 20_000)
    assert statuses.total() == 20_000
    assert statuses[200] > 4_000
