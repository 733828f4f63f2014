"""Event-loop time that a body of 1 MB costs: checked, and made the engine's. `python -m tests.bench.dialects`

The least of many runs is the figure, in CPU time: it moves little on a shared machine. One JSON object a line; exits 1
where a body takes more than 3 ms, be it of ordinary shape or made to cost much (left out with `--ordinary`).
"""

import gc
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


def calls(number: int, arguments: str, *, each: int = 1) -> list[dict[str, Any]]:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "assistant", "tool_calls": [call] * each}] * number


def uses(given: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": given}]}]


def brackets(pairs: int, zeros: int) -> str:
    return f"[{'[],' * pairs}{'0,' * zeros}0]"


EDIT = json.dumps({"path": "a.py", "text": "def f(x):\n    return {'a': [x]}\n" * 17})
"""What an agent writes: 620 bytes, brackets among them."""
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
    "300 calls with 180 kB of arguments, and their results": (
        CHAT,
        {
            "messages": [
                message
                for _ in range(300)
                for message in (*calls(1, EDIT), {"role": "tool", "tool_call_id": "c", "content": "r" * 2_500})
            ]
        },
    ),
    "parts, 4,096 of 200 bytes": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 200}] * 256}] * 16},
    ),
    "a table of 260,000 numbers as text": (CHAT, {"messages": one("1,2,3,4\n" * 65_000)}),
    "responses, 1,024 items of 1 kB": (RESPONSES, {"input": talk(1_024, 985)}),
}
HOSTILE: dict[str, tuple[str, dict[str, Any]]] = {
    "a role of 1 MB that looks like msgspec's sentences": (CHAT, {"messages": [{"role": " - at `" * 143_000}]}),
    "330,000 backslashes with a comma each": (CHAT, {"messages": one("\\," * 330_000)}),
    "a table of 100,000 cells with quotes": (CHAT, {"messages": one('"1234",' * 100_000)}),
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
    "arguments of 40 lists and 520,000 numbers": (CHAT, {"messages": calls(1, brackets(40, 520_000))}),
    "32 calls with 900 brackets each": (CHAT, {"messages": calls(1, brackets(900, 14_500), each=32)}),
    "arguments of one object with 40 objects": (
        CHAT,
        {"messages": calls(1, json.dumps({f"k{n}": {} if n < 40 else 1 for n in range(68_000)}))},
    ),
    "arguments that are walked as far as any": (CHAT, {"messages": calls(1, brackets(40, 130_000))}),
    "arguments 32 levels deep, 500 times": (CHAT, {"messages": calls(1, f"[{('[' * 31 + ']' * 31 + ',') * 500}0]")}),
    "inputs of 40 lists and 520,000 numbers": (
        MESSAGES,
        {"max_tokens": 5, "messages": uses({"a": [[]] * 40, "b": [0] * 520_000})},
    ),
    "an input of 520,000 numbers": (MESSAGES, {"max_tokens": 5, "messages": uses({"a": [0] * 520_000})}),
    "14,000 calls": (CHAT, {"messages": calls(110, "{}", each=128)}),
    "14,000 calls in one message": (CHAT, {"messages": calls(1, "{}", each=14_000)}),
    "1,000 thoughts with 200 summaries each": (
        RESPONSES,
        {"input": [{"role": "user", "content": "x"}, *[{"type": "reasoning", "summary": [{}] * 200}] * 1_000]},
    ),
    "520,000 token ids": (COMPLETIONS, {"prompt": [1] * 520_000}),
    "260,000 token ids": (COMPLETIONS, {"prompt": [1] * 260_000}),
    "responses, 30,000 empty items": (RESPONSES, {"input": one("") * 30_000}),
    "messages, 30,000 empty messages": (MESSAGES, {"max_tokens": 5, "messages": one("") * 30_000}),
    "17,000 results of calls": (
        CHAT,
        {"messages": [{"role": "tool", "tool_call_id": "a", "content": "x"}] * 17_000},
    ),
    "40,000 parts in one message": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": ""}] * 40_000}]},
    ),
    "a part of 500,000 escaped quotes": (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": '"' * 500_000}]}]},
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
    gc.collect()
    gc.freeze()  # as a worker does before it serves
    kinds = (("ordinary", ORDINARY), ("hostile", HOSTILE))
    for kind, cases in kinds[:1] if "--ordinary" in sys.argv else kinds:
        for name, (path, fields) in cases.items():
            body = json.dumps({"model": "bot", **fields}, separators=(",", ":"), ensure_ascii=False).encode()
            value, told = least_ms(dialects[path], body)
            line: dict[str, Any] = {
                "figure": f"policy: {name}",
                "bytes": len(body),
                "value_ms": round(value, 3),
                "told": told,
            }
            line |= {
                "shape": kind,
                "must_ms": MUST_MS,
                "ok": value <= MUST_MS and (kind, told) != ("ordinary", "refused"),
            }
            missed = missed or not line["ok"]
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
