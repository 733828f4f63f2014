"""What a line of a training file may hold: OpenAI's chat and preference rows, checked and brought into one form.

The one description of a row, for the check at upload (`datafile`) and for training (`dataset`). No torch here:
rows are strangers' bytes, and whoever takes them in must not pay for a training library.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from adapter_store.bounded_json import JsonInvalid, parse

Method = Literal["supervised", "dpo"]
Message = dict[str, Any]
Tool = dict[str, Any]

MAX_FAULTS = 50
MAX_LINE_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_ITEMS = 100_000  # commas of a line
MAX_TOOLS = 128
MAX_SHOWN = 40  # characters of a value in a reason
ROLES = ("system", "user", "assistant", "tool")
FIELDS = {
    "system": {"role", "content", "name"},
    "user": {"role", "content", "name"},
    "assistant": {"role", "content", "name", "tool_calls", "weight"},
    "tool": {"role", "content", "name", "tool_call_id"},
}
FUNCTION_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class RowInvalid(Exception):
    """A line is no row; the text is the reason, in words that quote little of the line."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one line of a data file; lines count from 1."""

    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation of a data file; `weights` has one entry, 0 or 1, per assistant message.

    Messages and tools are in the form in which vLLM 0.32 hands them to a chat template, so that a prompt is
    the same text in training and in serving: parts of a content joined by newlines, a missing content empty,
    a call's arguments an object, a tool's members in a fixed order.
    """

    line: int
    messages: list[Message]
    weights: list[int]
    tools: list[Tool] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Preference:
    """A prompt with the better and the worse answer; messages as in `Example`."""

    line: int
    messages: list[Message]
    preferred: Message
    non_preferred: Message
    tools: list[Tool] = field(default_factory=list)

    @property
    def chosen(self) -> Example:
        return self._with(self.preferred)

    @property
    def rejected(self) -> Example:
        return self._with(self.non_preferred)

    def _with(self, answer: Message) -> Example:
        """Only the answer is weighed; the assistant's turns in the prompt are read."""
        answers = sum(message["role"] == "assistant" for message in self.messages)
        return Example(self.line, [*self.messages, answer], [0] * answers + [1], self.tools)


def numbered_lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """The lines of a file in any cut, numbered from 1; of an over-long one only its first `MAX_LINE_BYTES` + 1 bytes.

    A blank line is given as it is. Holds a line and a chunk at a time, whatever the file.
    """
    number = 1
    line = bytearray()
    begun = False
    for chunk in chunks:
        start = 0
        while start < len(chunk):
            end = chunk.find(b"\n", start)
            stop = len(chunk) if end < 0 else end
            line += memoryview(chunk)[start : min(stop, start + MAX_LINE_BYTES + 1 - len(line))]
            begun = True
            start = stop + 1
            if end >= 0:
                yield number, _without_mark(number, line)
                number += 1
                line.clear()
                begun = False
    if begun:
        yield number, _without_mark(number, line)


def _without_mark(number: int, line: bytearray) -> bytes:
    return bytes(line).removeprefix(BYTE_ORDER_MARK) if number == 1 else bytes(line)


def parse_line(number: int, line: bytes, method: Method | None = None) -> Example | Preference:
    """The row of a line: of `method` where one is given, else of the method that its fields speak of.

    Raises:
        RowInvalid: the first thing that is wrong with it.
    """
    row = _given(_json_object(line))
    found: Method = "dpo" if row.keys() & {"input", "preferred_output", "non_preferred_output"} else "supervised"
    if method is not None and found != method:
        raise RowInvalid(f"a row for {_listed({found})} in a file for {_listed({method})}: a file holds one kind")
    return _preference(number, row) if found == "dpo" else _example(number, row)


def _json_object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise RowInvalid(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        row = parse(line, max_depth=MAX_DEPTH, max_items=MAX_ITEMS)
    except JsonInvalid as error:
        raise RowInvalid(f"not JSON that can be read: {error}") from None
    if not isinstance(row, dict):
        raise RowInvalid("not a JSON object")
    return row


def _example(number: int, row: dict[str, Any]) -> Example:
    _only(row, {"messages", "tools", "parallel_tool_calls"}, "the row")
    tools = _tools(row, "")
    messages = _messages(row.get("messages"), "messages", tools, parallel=_parallel(row, ""))
    if messages[-1]["role"] != "assistant":
        raise RowInvalid("the last message must be the assistant's")
    weights = [message.pop("weight", 1) for message in messages if message["role"] == "assistant"]
    if not any(weights):
        raise RowInvalid("every assistant message has weight 0, so there is nothing to learn")
    return Example(number, messages, weights, tools)


def _preference(number: int, row: dict[str, Any]) -> Preference:
    _only(row, {"input", "preferred_output", "non_preferred_output"}, "the row")
    given = row.get("input")
    if not isinstance(given, dict):
        raise RowInvalid("'input' must be an object with 'messages'")
    given = _given(given)
    _only(given, {"messages", "tools", "parallel_tool_calls"}, "input")
    tools, parallel = _tools(given, "input."), _parallel(given, "input.")
    messages = _messages(given.get("messages"), "input.messages", tools, parallel=parallel)
    if messages[-1]["role"] == "assistant":
        raise RowInvalid("the last message of input.messages must not be the assistant's: the outputs answer it")
    if any("weight" in message for message in messages):
        raise RowInvalid("input.messages has a 'weight': only the two outputs are compared")
    preferred = _output(row, "preferred_output", tools, parallel=parallel)
    non_preferred = _output(row, "non_preferred_output", tools, parallel=parallel)
    if preferred == non_preferred:
        raise RowInvalid("the two outputs are the same, so there is nothing to prefer")
    return Preference(number, messages, preferred, non_preferred, tools)


def _output(row: dict[str, Any], name: str, tools: list[Tool], *, parallel: bool) -> Message:
    messages = row.get(name)
    if not isinstance(messages, list) or len(messages) != 1:
        raise RowInvalid(f"{name!r} must be a list of exactly one message")
    message = _message(messages[0], f"{name}[0]", tools, parallel=parallel)
    if message["role"] != "assistant":
        raise RowInvalid(f"{name}[0].role must be 'assistant'")
    if "weight" in message:
        raise RowInvalid(f"{name}[0] has the unknown field 'weight'")
    return message


def _messages(given: object, where: str, tools: list[Tool], *, parallel: bool) -> list[Message]:
    if not isinstance(given, list) or not given:
        raise RowInvalid(f"'{where}' must be a list of at least one message")
    messages = [_message(message, f"{where}[{index}]", tools, parallel=parallel) for index, message in enumerate(given)]
    _check_calls_are_answered(messages, where)
    return messages


def _check_calls_are_answered(messages: list[Message], where: str) -> None:
    """Each call of an assistant's message by one tool message right after it, in any order; the last may wait."""
    waiting: set[str] = set()
    for index, message in enumerate(messages):
        if message["role"] == "tool":
            if message["tool_call_id"] not in waiting:
                raise RowInvalid(f"{where}[{index}].tool_call_id answers no call of the assistant's message before it")
            waiting.remove(message["tool_call_id"])
            continue
        if waiting:
            raise RowInvalid(f"{where}[{index}] comes before the answer to tool call {_shown(min(waiting))}")
        waiting = {call["id"] for call in message.get("tool_calls", ())}


def _message(given: object, where: str, tools: list[Tool], *, parallel: bool) -> Message:
    if not isinstance(given, dict):
        raise RowInvalid(f"{where} is not an object")
    given = _given(given)
    role = given.get("role")
    if role not in ROLES:
        raise RowInvalid(f"{where}.role is {_shown(role)}, not one of {', '.join(ROLES)}")
    _only(given, FIELDS[role], where)
    calls = given.get("tool_calls") if role == "assistant" else None
    empty = calls is not None or role == "tool"
    message: Message = {"role": role, "content": _content(given.get("content"), where, empty=empty)}
    if calls is not None:
        message["tool_calls"] = _calls(calls, where, tools, parallel=parallel)
    if "name" in given:
        message["name"] = _text(given["name"], f"{where}.name")
    if role == "tool":
        message["tool_call_id"] = _text(given.get("tool_call_id"), f"{where}.tool_call_id")
    if "weight" in given:
        message["weight"] = _weight(given["weight"], where)
    return message


def _content(given: object, where: str, *, empty: bool) -> str:
    """Texts of several parts are joined as vLLM joins them."""
    if given is None and empty:
        return ""
    if isinstance(given, list) and given:
        return "\n".join(_part(part, f"{where}.content[{index}]") for index, part in enumerate(given))
    return _text(given, f"{where}.content", empty=empty)


def _part(given: object, where: str) -> str:
    if not isinstance(given, dict) or given.get("type") != "text":
        raise RowInvalid(f"{where} is not a part of type 'text', the only one that can be trained on")
    _only(given, {"type", "text"}, where)
    return _text(given.get("text"), f"{where}.text")


def _text(given: object, where: str, *, empty: bool = False) -> str:
    if not isinstance(given, str) or not (given or empty):
        raise RowInvalid(f"{where} must be a text of at least one character")
    if "\0" in given:
        raise RowInvalid(f"{where} holds the character NUL, which no template or log can carry")
    if not _encodable(given):
        raise RowInvalid(f"{where} holds half of a surrogate pair, which is not valid Unicode")
    return given


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _weight(given: object, where: str) -> int:
    if isinstance(given, bool) or given not in (0, 1):
        raise RowInvalid(f"{where}.weight is {_shown(given)}, not 0 or 1")
    return int(given)  # 0, 1, 0.0 or 1.0


def _calls(given: object, where: str, tools: list[Tool], *, parallel: bool) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise RowInvalid(f"{where}.tool_calls must be a list of at least one call")
    if len(given) > 1 and not parallel:
        raise RowInvalid(f"{where} has {len(given)} tool calls, though 'parallel_tool_calls' is false")
    calls = [_call(call, f"{where}.tool_calls[{index}]", tools) for index, call in enumerate(given)]
    if len({call["id"] for call in calls}) < len(calls):
        raise RowInvalid(f"{where}.tool_calls has two calls of one id")
    return calls


def _call(given: object, where: str, tools: list[Tool]) -> dict[str, Any]:
    if not isinstance(given, dict) or given.get("type") != "function" or not isinstance(given.get("function"), dict):
        raise RowInvalid(f"{where} must be an object of type 'function' with a 'function'")
    _only(given, {"id", "type", "function"}, where)
    function = given["function"]
    _only(function, {"name", "arguments"}, f"{where}.function")
    name = _function_name(function.get("name"), f"{where}.function.name")
    if tools and name not in {tool["function"]["name"] for tool in tools}:
        raise RowInvalid(f"{where} calls {_shown(name)}, which is not in 'tools'")
    return {
        "id": _text(given.get("id"), f"{where}.id"),
        "type": "function",
        "function": {"name": name, "arguments": _arguments(function.get("arguments"), f"{where}.function.arguments")},
    }


def _arguments(given: object, where: str) -> dict[str, Any]:
    text = _text(given, where)
    try:
        arguments = parse(text.encode(), max_depth=MAX_DEPTH, max_items=MAX_ITEMS)
    except JsonInvalid as error:
        raise RowInvalid(f"{where} must hold JSON as text: {error}") from None
    if not isinstance(arguments, dict):
        raise RowInvalid(f"{where} must hold a JSON object as text")
    _check_json(arguments, where)
    return arguments


def _tools(row: dict[str, Any], where: str) -> list[Tool]:
    given = row.get("tools")
    if "tools" not in row:
        return []
    if not isinstance(given, list) or not 1 <= len(given) <= MAX_TOOLS:
        raise RowInvalid(f"'{where}tools' must be a list of 1 to {MAX_TOOLS} tools")
    tools = [_tool(tool, f"{where}tools[{index}]") for index, tool in enumerate(given)]
    if len({tool["function"]["name"] for tool in tools}) < len(tools):
        raise RowInvalid(f"'{where}tools' has two functions of one name")
    return tools


def _tool(given: object, where: str) -> Tool:
    """In vLLM 0.32's order, and as there with null for what is not given."""
    if not isinstance(given, dict) or given.get("type") != "function" or not isinstance(given.get("function"), dict):
        raise RowInvalid(f"{where} must be an object of type 'function' with a 'function'")
    _only(given, {"type", "function"}, where)
    function = given["function"]
    _only(function, {"name", "description", "parameters", "strict"}, f"{where}.function")
    description, parameters, strict = (function.get(name) for name in ("description", "parameters", "strict"))
    tool = {
        "name": _function_name(function.get("name"), f"{where}.function.name"),
        "description": None if description is None else _text(description, f"{where}.function.description", empty=True),
        "parameters": parameters,
    }
    if parameters is not None:
        if not isinstance(parameters, dict):
            raise RowInvalid(f"{where}.function.parameters must be a JSON schema, an object")
        _check_json(parameters, f"{where}.function.parameters")
    if strict is not None:
        if not isinstance(strict, bool):
            raise RowInvalid(f"{where}.function.strict must be true or false")
        tool["strict"] = strict
    return {"type": "function", "function": tool}


def _parallel(row: dict[str, Any], where: str) -> bool:
    given = row.get("parallel_tool_calls", True)
    if not isinstance(given, bool):
        raise RowInvalid(f"'{where}parallel_tool_calls' must be true or false")
    return given


def _function_name(given: object, where: str) -> str:
    if not isinstance(given, str) or not FUNCTION_NAME.fullmatch(given):
        raise RowInvalid(f"{where} must have 1 to 64 letters, digits, _ or -")
    return given


def _check_json(value: object, where: str) -> None:
    text = json.dumps(value, ensure_ascii=False)
    if "\\u0000" in text and "\0" in "".join(_strings(value)):
        raise RowInvalid(f"{where} holds the character NUL, which no template or log can carry")
    if not _encodable(text):
        raise RowInvalid(f"{where} holds half of a surrogate pair, which is not valid Unicode")


def _strings(value: object) -> Iterator[str]:
    match value:
        case str():
            yield value
        case list():
            for item in value:
                yield from _strings(item)
        case dict():
            for key, item in value.items():
                yield key
                yield from _strings(item)


def _given(members: dict[str, Any]) -> dict[str, Any]:
    """Without the nulls that table formats write for what is absent."""
    return {name: value for name, value in members.items() if value is not None}


def _only(given: dict[str, Any], allowed: set[str], where: str) -> None:
    if unknown := given.keys() - allowed:
        raise RowInvalid(f"{where} has the unknown field {_listed(unknown)}")


def _listed(names: set[str]) -> str:
    listed = ", ".join(_shown(name) for name in sorted(names)[:5])
    return listed if len(names) <= 5 else f"{listed} and {len(names) - 5} more"


def _shown(value: object) -> str:
    """Printable and short, whatever a stranger wrote."""
    text = (
        ascii(value) if not isinstance(value, (list, dict)) else f"a {'list' if isinstance(value, list) else 'object'}"
    )
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"
