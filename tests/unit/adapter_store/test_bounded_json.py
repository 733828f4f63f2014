"""JSON with limits."""

import json
import random
import time
from typing import Any

import pytest

from adapter_store.bounded_json import JsonInvalid, parse

MANY = 1 << 20


def depth_of(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 0
    return 1 + max(map(depth_of, value.values() if isinstance(value, dict) else value), default=0)


def drawn(draw: random.Random, depth: int) -> Any:
    if depth == 0 or draw.randrange(3) == 0:
        return draw.choice([1, -0.5, None, "", "a[b", '"]', "\\", "{", '\\"[[', "é}"])
    if draw.randrange(2):
        return [drawn(draw, depth - 1) for _ in range(draw.randrange(4))]
    return {f'{number}["': drawn(draw, depth - 1) for number in range(draw.randrange(4))}


def test_depth_is_counted_as_a_parser_would() -> None:
    """5,000 documents, brackets in strings among them: what is at most so deep is parsed, the rest refused as deep."""
    draw = random.Random(0)
    accepted = 0
    for _ in range(5_000):
        value, limit = drawn(draw, draw.randrange(8)), draw.randrange(1, 6)
        text = json.dumps(value, ensure_ascii=bool(draw.randrange(2))).encode()
        if depth_of(value) <= limit:
            assert parse(text, max_depth=limit, max_items=MANY) == value
            accepted += 1
        else:
            with pytest.raises(JsonInvalid, match="nested deeper"):
                parse(text, max_depth=limit, max_items=MANY)
    assert 1_000 < accepted < 4_900


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (b"", "Expecting value"),
        (b"[", "Expecting value"),
        (b"]", "Expecting value"),
        (b"[}", "Expecting value"),
        (b"{}{}", "Extra data"),
        (b'{"a": 1, "a": 2}', "duplicate key"),
        (b'{"a": NaN}', "NaN"),
        (b"1e999", "does not fit"),
        (b"1" * 21, "21 digits"),
        (b"0." + b"1" * 50, "52 characters"),
        (b"\xff", "not UTF-8"),
        (b"[1,1,1,1,1]", "more than 3 members"),
    ],
)
def test_what_is_not_json_within_the_limits_is_told(text: bytes, told: str) -> None:
    """The error says in which way."""
    with pytest.raises(JsonInvalid, match=told):
        parse(text, max_depth=3, max_items=3)


@pytest.mark.parametrize(
    "text",
    [
        b"[]" * (2 << 20),
        b"]" * (4 << 20),
        b"[" * (4 << 20),
        b'"' * (4 << 20),
        b'{"' + b"\\" * (4 << 20),
        b"9" * (4 << 20),
    ],
)
def test_megabytes_of_nonsense_cost_little(text: bytes) -> None:
    """4 MiB take less than a second and a half of CPU."""
    begin = time.process_time()
    with pytest.raises(JsonInvalid):
        parse(text, max_depth=3, max_items=MANY)
    assert time.process_time() - begin < 1.5
