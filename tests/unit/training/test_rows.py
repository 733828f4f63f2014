"""What a line may hold, fault by fault, and into what form it is brought."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import rows
from training.rows import Example, Preference, RowInvalid, numbered_lines, parse_line

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
TOLD = {"role": "tool", "tool_call_id": "c1", "content": "sunny"}


def chat(*messages: object, **more: object) -> bytes:
    return json.dumps({"messages": list(messages), **more}).encode()


def preference(**changed: object) -> bytes:
    row: dict[str, object] = {
        "input": {"messages": [USER]},
        "preferred_output": [ASSISTANT],
        "non_preferred_output": [ASSISTANT | {"content": "What?"}],
    }
    return json.dumps(row | changed).encode()


def calling(**changed: object) -> bytes:
    return chat(USER, {"role": "assistant", "tool_calls": [CALL | changed]})


def function(**changed: object) -> bytes:
    return chat(USER, ASSISTANT, tools=[{"type": "function", "function": {"name": "weather"} | changed}])


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "not json": (b"{nope", "not JSON that can be read: Expecting property name"),
    "two objects": (chat(USER, ASSISTANT) * 2, "not JSON that can be read: Extra data"),
    "not utf-8": (b'{"messages": "\xff"}', "not UTF-8 at byte 14"),
    "utf-16": (chat(USER, ASSISTANT).decode().encode("utf-16"), "not UTF-8 at byte 0"),
    "a byte order mark": (rows.BYTE_ORDER_MARK + chat(USER, ASSISTANT), "not JSON that can be read"),
    "deep nesting": (b"[" * 100_000, "nested deeper than 32"),
    "nesting of objects": (b'{"a":' * 40 + b"1" + b"}" * 40, "nested deeper than 32"),
    "huge number": (b"9" * 5_000, "a number of 5000 digits"),
    "number past a float": (b'{"messages": 1e999}', "the number 1e999 does not fit a float"),
    "nan": (b'{"messages": NaN}', "NaN is not a JSON number"),
    "raw nul": (b'{"messages": "\0"}', "not JSON that can be read"),
    "same key twice": (b'{"messages": [], "messages": []}', "duplicate key 'messages'"),
    "many members": (b"[" + b"1," * 200_000 + b"1]", "more than 100000 members"),
    "a list": (b"[1, 2]", "not a JSON object"),
    "null": (b"null", "not a JSON object"),
    "over-long line": (chat(USER, ASSISTANT | {"content": "x" * rows.MAX_LINE_BYTES}), "longer than 1048576 bytes"),
    "no messages": (b"{}", "'messages' must be a list"),
    "messages is a text": (b'{"messages": "x"}', "'messages' must be a list"),
    "no message": (chat(), "'messages' must be a list of at least one message"),
    "another field": (chat(USER, ASSISTANT, functions=[]), "the row has the unknown field 'functions'"),
    "many other fields": (chat(USER, ASSISTANT, **{f"f{i}": 1 for i in range(9)}), "'f4' and 4 more"),
    "message is a text": (chat("x"), "messages[0] is not an object"),
    "unknown role": (chat({"role": "critic", "content": "x"}, ASSISTANT), "messages[0].role is 'critic', not one of"),
    "role is a list": (chat({"role": ["user"], "content": "x"}), "messages[0].role is a list"),
    "endless role": (chat({"role": "x" * 10_000}), "messages[0].role is '" + "x" * 38 + "…, not"),
    "no role": (chat({"content": "x"}), "messages[0].role is None"),
    "no content": (chat({"role": "user"}, ASSISTANT), "messages[0].content must be a text"),
    "empty content": (chat(USER, {"role": "assistant", "content": ""}), "messages[1].content must be a text"),
    "no parts": (chat(USER, {"role": "assistant", "content": []}), "messages[1].content must be a text"),
    "a picture": (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, ASSISTANT),
        "messages[0].content[0] is not a part of type 'text'",
    ),
    "a part without text": (chat(USER | {"content": [{"type": "text"}]}, ASSISTANT), "content[0].text must be a text"),
    "a part with more": (
        chat(USER | {"content": [{"type": "text", "text": "x", "cache": 1}]}, ASSISTANT),
        "messages[0].content[0] has the unknown field 'cache'",
    ),
    "half a surrogate": (chat(USER, ASSISTANT | {"content": "\ud800"}), "half of a surrogate pair"),
    "nul in a text": (chat(USER, ASSISTANT | {"content": "a\0"}), "messages[1].content holds the character NUL"),
    "unknown message field": (chat(USER | {"refusal": "no"}, ASSISTANT), "messages[0] has the unknown field 'refusal'"),
    "name is a number": (chat(USER | {"name": 7}, ASSISTANT), "messages[0].name must be a text"),
    "weight of a user": (chat(USER | {"weight": 1}, ASSISTANT), "messages[0] has the unknown field 'weight'"),
    "weight one half": (chat(USER, ASSISTANT | {"weight": 0.5}), "messages[1].weight is 0.5, not 0 or 1"),
    "weight is a boolean": (chat(USER, ASSISTANT | {"weight": True}), "messages[1].weight is True, not 0 or 1"),
    "weight is a list": (chat(USER, ASSISTANT | {"weight": [1]}), "messages[1].weight is a list, not 0 or 1"),
    "nothing to learn": (chat(USER, ASSISTANT | {"weight": 0}), "every assistant message has weight 0"),
    "ends with the user": (chat(USER, ASSISTANT, USER), "the last message must be the assistant's"),
    "ends with a tool": (chat(USER, CALLING, TOLD), "the last message must be the assistant's"),
    "tools is an object": (chat(USER, ASSISTANT, tools={}), "'tools' must be a list of 1 to 128 tools"),
    "no tools": (chat(USER, ASSISTANT, tools=[]), "'tools' must be a list of 1 to 128 tools"),
    "129 tools": (chat(USER, ASSISTANT, tools=[WEATHER] * 129), "'tools' must be a list of 1 to 128 tools"),
    "two tools of a name": (chat(USER, ASSISTANT, tools=[WEATHER] * 2), "two functions of one name"),
    "a tool of another type": (chat(USER, ASSISTANT, tools=[{"type": "retrieval"}]), "tools[0] must be an object of"),
    "a tool with more": (chat(USER, ASSISTANT, tools=[WEATHER | {"x": 1}]), "tools[0] has the unknown field 'x'"),
    "function with more": (function(returns={}), "tools[0].function has the unknown field 'returns'"),
    "function without name": (function(name=""), "tools[0].function.name must have 1 to 64 letters"),
    "description is a number": (function(description=1), "tools[0].function.description must be a text"),
    "parameters is a list": (function(parameters=[]), "tools[0].function.parameters must be a JSON schema"),
    "nul in parameters": (function(parameters={"a": ["\0"]}), "tools[0].function.parameters holds the character NUL"),
    "half in parameters": (function(parameters={"\ud800": 1}), "tools[0].function.parameters holds half of a"),
    "strict is a text": (function(strict="yes"), "tools[0].function.strict must be true or false"),
    "parallel is a number": (chat(USER, ASSISTANT, parallel_tool_calls=1), "'parallel_tool_calls' must be true or"),
    "calls of a user": (chat(USER | {"tool_calls": [CALL]}, ASSISTANT), "messages[0] has the unknown field"),
    "no calls": (chat(USER, ASSISTANT | {"tool_calls": []}), "messages[1].tool_calls must be a list of at least one"),
    "call is a text": (chat(USER, {"role": "assistant", "tool_calls": ["x"]}), "tool_calls[0] must be an object of"),
    "call without id": (calling(id=""), "messages[1].tool_calls[0].id must be a text"),
    "call of another type": (calling(type="custom"), "messages[1].tool_calls[0] must be an object of type 'function'"),
    "call with more": (calling(index=0), "messages[1].tool_calls[0] has the unknown field 'index'"),
    "arguments are no text": (
        calling(function={"name": "f", "arguments": {}}),
        "messages[1].tool_calls[0].function.arguments must be a text",
    ),
    "arguments are no json": (
        calling(function={"name": "f", "arguments": "{"}),
        "messages[1].tool_calls[0].function.arguments must hold JSON as text",
    ),
    "arguments are a list": (calling(function={"name": "f", "arguments": "[]"}), "must hold a JSON object as text"),
    "a function not declared": (
        chat(USER, CALLING, tools=[WEATHER | {"function": {"name": "time"}}]),
        "messages[1].tool_calls[0] calls 'weather', which is not in 'tools'",
    ),
    "two calls of an id": (chat(USER, {"role": "assistant", "tool_calls": [CALL, CALL]}), "two calls of one id"),
    "calls in parallel": (
        chat(USER, {"role": "assistant", "tool_calls": [CALL, CALL | {"id": "c2"}]}, parallel_tool_calls=False),
        "messages[1] has 2 tool calls, though 'parallel_tool_calls' is false",
    ),
    "an answer to no call": (chat(USER, TOLD, ASSISTANT), "messages[1].tool_call_id answers no call"),
    "an answer given twice": (chat(USER, CALLING, TOLD, TOLD, ASSISTANT), "messages[3].tool_call_id answers no call"),
    "a call without answer": (chat(USER, CALLING, USER, ASSISTANT), "messages[2] comes before the answer to tool call"),
    "input is a list": (preference(input=[]), "'input' must be an object with 'messages'"),
    "input without messages": (preference(input={}), "'input.messages' must be a list"),
    "input with more": (preference(input={"messages": [USER], "x": 1}), "input has the unknown field 'x'"),
    "input ends with an answer": (preference(input={"messages": [USER, ASSISTANT]}), "must not be the assistant's"),
    "input with a weight": (
        preference(input={"messages": [USER, ASSISTANT | {"weight": 1}, USER]}),
        "input.messages has a 'weight'",
    ),
    "no preferred output": (preference(preferred_output=None), "'preferred_output' must be a list of exactly one"),
    "two outputs": (preference(preferred_output=[ASSISTANT] * 2), "'preferred_output' must be a list of exactly one"),
    "output of a user": (preference(non_preferred_output=[USER]), "non_preferred_output[0].role must be 'assistant'"),
    "output with a weight": (
        preference(preferred_output=[ASSISTANT | {"weight": 1}]),
        "preferred_output[0] has the unknown field 'weight'",
    ),
    "equal outputs": (preference(non_preferred_output=[ASSISTANT]), "the two outputs are the same"),
    "both kinds": (preference(messages=[USER, ASSISTANT]), "the row has the unknown field 'messages'"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_told_its_reason(line: bytes, reason: str) -> None:
    """In words that name the place, and short whatever the line holds."""
    with pytest.raises(RowInvalid) as caught:
        parse_line(1, line)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 400
    assert str(caught.value).replace("…", "").isprintable()


def test_a_chat_keeps_what_is_to_be_learned() -> None:
    """Weights stand beside the messages, one per turn of the assistant."""
    row = parse_line(3, chat(USER | {"name": "Ann"}, ASSISTANT | {"weight": 0}, USER, ASSISTANT))
    assert row == Example(3, [USER | {"name": "Ann"}, ASSISTANT, USER, ASSISTANT], [0, 1])


def test_calls_and_tools_take_the_form_that_serving_gives_them() -> None:
    """As vLLM 0.32: arguments as an object, null for what a tool leaves out, an empty content, joined parts."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = parse_line(1, chat(USER | {"content": parts}, CALLING, TOLD, ASSISTANT, tools=[WEATHER]))
    assert isinstance(row, Example)
    function = {"name": "weather", "description": None, "parameters": {"type": "object"}}
    assert row.tools == [{"type": "function", "function": function}]
    assert list(row.tools[0]["function"]) == ["name", "description", "parameters"]
    called = CALL | {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
    assert row.messages[:2] == [
        {"role": "user", "content": "a\nb"},
        {"role": "assistant", "content": "", "tool_calls": [called]},
    ]


def test_nulls_are_what_is_absent() -> None:
    """Table formats write every column of every row."""
    row = parse_line(1, chat(USER | {"name": None}, ASSISTANT | {"tool_calls": None, "weight": None}, tools=None))
    assert row == Example(1, [USER, ASSISTANT], [1])


def test_a_preference_is_two_examples_whose_answers_alone_count() -> None:
    """Earlier turns of the assistant are read, not weighed."""
    row = parse_line(2, preference(input={"messages": [USER, ASSISTANT, USER]}))
    assert isinstance(row, Preference)
    assert row.chosen == Example(2, [USER, ASSISTANT, USER, ASSISTANT], [0, 1])
    assert row.rejected == Example(2, [USER, ASSISTANT, USER, ASSISTANT | {"content": "What?"}], [0, 1])


def test_a_file_holds_rows_of_one_kind() -> None:
    """A row of the other kind is a fault where the kind is known."""
    with pytest.raises(RowInvalid, match="a row for 'dpo' in a file for 'supervised'"):
        parse_line(1, preference(), "supervised")
    with pytest.raises(RowInvalid, match="a row for 'supervised' in a file for 'dpo'"):
        parse_line(1, chat(USER, ASSISTANT), "dpo")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
)
PLACES = [
    *(("messages", 1, name) for name in ("role", "content", "weight", "tool_calls", "name")),
    *(("messages", 1, "tool_calls", 0, name) for name in ("id", "type", "function")),
    *(("messages", 1, "tool_calls", 0, "function", name) for name in ("name", "arguments")),
    *(("tools", 0, "function", name) for name in ("name", "description", "parameters", "strict")),
    *(("messages", 2, "tool_call_id"), ("messages", 3), ("tools", 0), ("messages",), ("tools",), ("x",)),
]


@given(st.sampled_from(PLACES), JSON)
def test_any_value_at_any_place_is_a_row_or_a_reason(place: tuple[str | int, ...], value: object) -> None:
    """No value of a stranger's raises anything else, and what is taken can be read again."""
    row: Any = json.loads(chat(USER, CALLING, TOLD, ASSISTANT, tools=[WEATHER]))
    inner = row
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    with suppress(RowInvalid):
        taken = parse_line(1, json.dumps(row).encode())
        assert isinstance(taken, Example)
        json.dumps([taken.messages, taken.tools], ensure_ascii=False, allow_nan=False).encode()


@given(st.binary(max_size=60))
def test_any_bytes_are_a_row_or_a_reason(line: bytes) -> None:
    """Bytes that are no JSON at all too."""
    with pytest.raises(RowInvalid):
        parse_line(1, line)


@given(st.lists(st.binary(max_size=12)), st.lists(st.integers(1, 7), min_size=1))
def test_lines_are_the_same_however_the_file_is_cut(pieces: list[bytes], sizes: list[int]) -> None:
    """Chunk borders are nowhere to be seen: in a line end, in a letter, in the byte order mark."""
    whole = b"\n".join(pieces)
    cut: list[bytes] = []
    at = 0
    while at < len(whole):
        size = sizes[len(cut) % len(sizes)]
        cut.append(whole[at : at + size])
        at += size
    lines = whole.removeprefix(rows.BYTE_ORDER_MARK).split(b"\n")
    if whole.endswith(b"\n") or not whole:
        lines.pop()
    assert list(numbered_lines(cut)) == list(enumerate(lines, start=1))


def test_of_an_over_long_line_only_its_beginning_is_held() -> None:
    """A file without line ends costs no more memory than the longest line that is allowed."""
    chunks = (b"x" * 65_536 for _ in range(64))
    (number, line), last = numbered_lines([*chunks, b"\nend"])
    assert (number, len(line), last) == (1, rows.MAX_LINE_BYTES + 1, (2, b"end"))
