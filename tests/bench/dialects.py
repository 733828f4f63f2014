"""Event-loop time that a body of 1 MB costs: checked, and made the engine's. `python -m tests.bench.dialects`

The least of many runs is the figure, in CPU time: it moves little on a shared machine. One JSON object a line; exits 1
where a body of ordinary shape takes more than 3 ms.
"""

import json
import sys
import time
from typing import Any

from gateway.dialects import Bounds, Dialect, all_dialects
from gateway.errors import RequestInvalid

RUNS = 60
MUST_MS = 3.0
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"


def talk(messages: int, size: int) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[n % 2], "content": "word " * (size // 5)} for n in range(messages)]


def one(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content}]


def deep() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for level in range(14):
        properties = {f"p{level}": schema, "q": {"type": "integer"}}
        schema = {"type": "object", "properties": properties, "required": list(properties)}
    return schema


def tools(number: int) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": f"f{n}", "parameters": deep()}} for n in range(number)]


def turns(number: int) -> list[dict[str, Any]]:
    return [
        message
        for n in range(number)
        for message in (
            {
                "role": "assistant",
                "content": [{"type": "tool_use", "id": f"c{n}", "name": "f", "input": {"x": "x" * 900}}],
            },
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": f"c{n}", "content": "r" * 900}]},
        )
    ]


ORDINARY: dict[str, tuple[str, dict[str, Any]]] = {
    "a chat of 30 bytes": (CHAT, {"messages": one("hello")}),
    "1,024 messages of 1 kB": (CHAT, {"messages": talk(1_024, 985)}),
    "one message": (CHAT, {"messages": one("word " * 209_000)}),
    "one message, not ASCII": (CHAT, {"messages": one("語" * 349_000)}),
    "one message, every third character escaped": (CHAT, {"messages": one('a "b"\n' * 116_000)}),
    "33 tools with schemas 14 levels deep, required": (
        CHAT,
        {"messages": talk(500, 1_900), "tools": tools(33), "tool_choice": "required"},
    ),
    "messages, 1,024 of 1 kB": (MESSAGES, {"max_tokens": 5, "messages": talk(1_024, 985)}),
    "messages, 500 uses of tools": (MESSAGES, {"max_tokens": 5, "messages": turns(500)}),
    "responses, 1,024 items of 1 kB": (RESPONSES, {"input": talk(1_024, 985)}),
}
HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "174,000 token ids": (COMPLETIONS, {"prompt": [12_345] * 174_000}),
    "34,000 empty messages": (CHAT, {"messages": one("") * 34_000}),
    "37,000 empty parts": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 256}] * 144},
    ),
    "a schema of 340,000 objects": (
        CHAT,
        {
            "messages": one("x"),
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"a": [{}] * 340_000}}},
        },
    ),
    "arguments of 250,000 lists": (
        MESSAGES,
        {
            "max_tokens": 5,
            "messages": [
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": [[]] * 250}}],
                }
            ]
            * 1_000,
        },
    ),
    "22,000 tools": (CHAT, {"messages": one("x"), "tools": [{"type": "function", "function": {"name": "f"}}] * 22_000}),
    "90,000 biases": (CHAT, {"messages": one("x"), "logit_bias": {str(n): 1 for n in range(90_000)}}),
}


def least_ms(dialect: Dialect, body: bytes) -> tuple[float, str]:
    least, told = float("inf"), "sent"
    for _ in range(RUNS):
        began = time.process_time()
        try:
            checked = dialect.check(body)
            checked.upstream_body(model="a-0123456789abcdef", cache_salt="s" * 32, context_length=131_072)
        except RequestInvalid:
            told = "refused"
        least = min(least, time.process_time() - began)
    return least * 1_000, told


def main() -> int:
    dialects = all_dialects(Bounds(calls_tools=True))
    missed = False
    for kind, cases in (("ordinary", ORDINARY), ("hostile", HOSTILE)):
        for name, (path, fields) in cases.items():
            body = json.dumps({"model": "bot", **fields}, separators=(",", ":"), ensure_ascii=False).encode()
            value, told = least_ms(dialects[path], body)
            line: dict[str, Any] = {
                "figure": f"policy: {name}",
                "bytes": len(body),
                "value_ms": round(value, 3),
                "told": told,
            }
            if kind == "ordinary":
                line |= {"must_ms": MUST_MS, "ok": value <= MUST_MS}
                missed = missed or value > MUST_MS
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
