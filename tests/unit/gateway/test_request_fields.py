"""What a tenant may ask, field by field, in each dialect."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import fields as fields_of

from gateway.dialects import DIALECTS, OPT_IN, Bounds, Checked, Dialect, all_dialects
from gateway.dialects.counts import AskedTokens, InputTokens
from gateway.dialects.dialect import cut
from gateway.dialects.fields import GATEWAY_SET, REFUSED
from gateway.dialects.schemas import MOST_CHOICES, MOST_NODES
from gateway.dialects.words import (
    MOST_BRACKETS,
    MOST_CALLS,
    MOST_ESCAPES,
    MOST_MARKS,
    MOST_PARTS,
    MOST_QUOTES,
    MOST_TOKENS,
    MOST_VALUES,
    MOST_WALKED_BYTES,
    hold_values,
    is_deeper,
)
from gateway.errors import ContextLengthExceeded, RequestInvalid

BOUNDS = Bounds(max_messages=8, max_output_tokens=100, max_schema_bytes=8_000, calls_tools=True)
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
LEAST: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "hello"},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": HELLO, "max_tokens": 7},
    "/v1/messages/count_tokens": {"messages": HELLO},
    "/v1/responses/input_tokens": {"input": "hello"},
    "/v1/tokenize": {"messages": HELLO},
}
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a":"x"}'}}


def body(path: str, /, **fields: Any) -> bytes:
    return json.dumps({"model": "bot", **LEAST[path], **fields}).encode()


def ask(path: str, bounds: Bounds = BOUNDS, /, **fields: Any) -> Checked:
    return all_dialects(bounds)[path].check(body(path, **fields))


def sent(checked: Checked, context_length: int = 1_000) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        checked.upstream_body(model="a-1", cache_salt="s", context_length=context_length)
    )
    return found


def refused(path: str = CHAT, bounds: Bounds = BOUNDS, **fields: Any) -> RequestInvalid:
    with pytest.raises(RequestInvalid) as error:
        ask(path, bounds, **fields)
    return error.value


def test_the_upstream_body_is_built() -> None:
    """It has what was checked and what the gateway sets, and nothing else."""
    assert sent(ask(CHAT, temperature=0.5, user="u", metadata={"a": "b"}, store=False)) == {
        "model": "a-1",
        "cache_salt": "s",
        "messages": HELLO,
        "temperature": 0.5,
        "max_tokens": 100,
    }


def test_the_upstream_body_may_be_built_again() -> None:
    """A second replica's context is not the first's."""
    checked = ask(CHAT)
    assert sent(checked, context_length=64)["max_tokens"] == 64
    assert sent(checked)["max_tokens"] == 100


def test_a_prompt_of_token_ids_is_counted() -> None:
    """One digit or six: what is reserved is their number; a text is reserved by the body's bytes."""
    assert ask(COMPLETIONS, prompt=[1] * 26_000).prompt_tokens == 26_000
    assert ask(COMPLETIONS, prompt=[123_456] * 26_000).prompt_tokens == 26_000
    text = ask(COMPLETIONS, prompt="x" * 26_000)
    assert text.prompt_tokens == text.prompt_bytes // 4 == 6_507


def test_a_stream_is_asked_with_its_usage() -> None:
    """Of each event, so that a cut stream is counted; the client sees it only where it asked."""
    checked = ask(CHAT, stream=True)
    assert sent(checked)["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert not checked.wants_usage
    assert ask(CHAT, stream=True, stream_options={"include_usage": True}).wants_usage


def test_a_length_is_always_sent() -> None:
    """Without one an answer would run to the context's end; a plain completion has OpenAI's default."""
    assert sent(ask(CHAT))["max_tokens"] == 100
    assert sent(ask(CHAT, max_completion_tokens=7))["max_tokens"] == 7
    assert sent(ask(COMPLETIONS))["max_tokens"] == 16
    assert sent(ask(RESPONSES))["max_output_tokens"] == 100
    assert ask(CHAT, n=3, max_tokens=5).max_tokens == 15


def test_a_length_that_the_model_cannot_hold_is_told() -> None:
    """The client's own max_tokens is never cut in silence."""
    for path, name in ((CHAT, "max_tokens"), (CHAT, "max_completion_tokens"), (RESPONSES, "max_output_tokens")):
        with pytest.raises(ContextLengthExceeded, match="64 tokens") as error:
            sent(ask(path, BOUNDS, **{name: 65}), context_length=64)
        assert error.value.param == name


def test_a_plan_holds_the_length() -> None:
    """What the client asked for is refused by its name, what it left open is cut."""
    checked = ask(CHAT)
    checked.limit_output(20)
    assert sent(checked)["max_tokens"] == 20
    with pytest.raises(RequestInvalid, match="20 on your plan") as error:
        ask(RESPONSES, max_output_tokens=21).limit_output(20)
    assert error.value.param == "max_output_tokens"


@pytest.mark.parametrize("kind", DIALECTS, ids=lambda kind: kind.path)
def test_a_refused_field_is_named_with_its_reason(kind: type[Dialect]) -> None:
    """Whoever sends it learns that it is known, and why it is not taken."""
    for field in kind.refused.keys() - {one.name for one in fields_of(kind.request)} - kind.opt_in:
        error = refused(kind.path, BOUNDS, **{field: 1})
        assert (error.param, error.own_code) == (field, "unsupported_parameter")
        assert kind.refused[field] in error.message


@pytest.mark.parametrize("kind", DIALECTS, ids=lambda kind: kind.path)
def test_only_the_gateway_sets_its_fields(kind: type[Dialect]) -> None:
    """Salt, priority and id are not a tenant's to say."""
    for field in GATEWAY_SET - {"model"}:
        error = refused(kind.path, BOUNDS, **{field: "x"})
        assert (error.param, error.own_code) == (field, "unsupported_parameter")


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"unheard_of": 1}, "unheard_of"),
        (CHAT, {"messages": [{"role": "user", "content": "x", "evil": 1}]}, "messages[0].evil"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": HELLO * 9}, "messages"),
        (CHAT, {"messages": [{"role": "root", "content": "x"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        (
            CHAT,
            {"messages": [*HELLO, {"role": "assistant", "tool_calls": [{"id": "c"}]}]},
            "messages[1].tool_calls[0].function",
        ),
        (CHAT, {"model": ""}, "model"),
        (CHAT, {"model": 3}, "model"),
        (CHAT, {"n": 5}, "n"),
        (CHAT, {"n": 0}, "n"),
        (CHAT, {"max_tokens": 101}, "max_tokens"),
        (CHAT, {"max_tokens": 0}, "max_tokens"),
        (CHAT, {"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        (CHAT, {"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        (CHAT, {"temperature": 2.1}, "temperature"),
        (CHAT, {"top_p": 0}, "top_p"),
        (CHAT, {"logit_bias": {"not an id": 1}}, "logit_bias"),
        (CHAT, {"logit_bias": {"1": 101}}, "logit_bias[...]"),
        (CHAT, {"stop": ["x"] * 17}, "stop"),
        (CHAT, {"stop": ""}, "stop"),
        (CHAT, {"top_logprobs": 5}, "top_logprobs"),
        (CHAT, {"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options"),
        (CHAT, {"response_format": {"type": "json_schema"}}, "response_format"),
        (CHAT, {"response_format": {"type": "xml"}}, "response_format.type"),
        (CHAT, {"tools": []}, "tools"),
        (CHAT, {"tools": [TOOL, TOOL]}, "tools"),
        (CHAT, {"tools": [TOOL] * 129}, "tools"),
        (CHAT, {"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (CHAT, {"tool_choice": "required"}, "tool_choice"),
        (CHAT, {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        (COMPLETIONS, {"prompt": ["a", "b"]}, "prompt"),
        (COMPLETIONS, {"prompt": [[1, 2]]}, "prompt"),
        (COMPLETIONS, {"prompt": [-1]}, "prompt"),
        (COMPLETIONS, {"prompt": [1.5]}, "prompt"),
        (COMPLETIONS, {"prompt": [10**10]}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"logprobs": 6}, "logprobs"),
        (RESPONSES, {"background": True}, "background"),
        (RESPONSES, {"previous_response_id": "resp_1"}, "previous_response_id"),
        (RESPONSES, {"prompt": {"id": "p"}}, "prompt"),
        (RESPONSES, {"conversation": "c"}, "conversation"),
        (RESPONSES, {"truncation": "auto"}, "truncation"),
        (RESPONSES, {"include": ["file_search_call.results"]}, "include[0]"),
        (RESPONSES, {"tools": [{"type": "web_search"}]}, "tools[0].type"),
        (RESPONSES, {"tools": [{"type": "mcp", "server_label": "x"}]}, "tools[0].type"),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        (RESPONSES, {"input": [{"role": "user"}]}, "input[0]"),
        (RESPONSES, {"input": [{"type": "function_call", "name": "f"}]}, "input[0]"),
        (RESPONSES, {"input": []}, "input"),
        (RESPONSES, {"input": 3}, "input"),
        (RESPONSES, {"top_logprobs": 2}, "top_logprobs"),
        (RESPONSES, {"reasoning": {"effort": "high"}}, "reasoning"),
        (RESPONSES, {"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format"),
        (MESSAGES, {"max_tokens": 0}, "max_tokens"),
        (MESSAGES, {"temperature": 1.5}, "temperature"),
        (MESSAGES, {"thinking": {"type": "enabled", "budget_tokens": 2_000}}, "thinking.type"),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        (MESSAGES, {"messages": [{"role": "user", "content": [{"type": "tool_use"}]}]}, "messages[0].content[0].type"),
        (MESSAGES, {"messages": [{"role": "system", "content": "x"}]}, "messages"),
        (MESSAGES, {"system": [{"type": "text", "text": "x", "evil": 1}]}, "system[0].evil"),
        (MESSAGES, {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        (MESSAGES, {"tool_choice": {"type": "any"}}, "tool_choice"),
        (MESSAGES, {"output_config": {"effort": "high"}}, "output_config.effort"),
        ("/v1/tokenize", {"prompt": "x"}, "prompt"),
    ],
)
def test_a_bad_value_is_named(path: str, fields: dict[str, Any], param: str) -> None:
    """The error's param is the field, as OpenAI writes it."""
    assert refused(path, **fields).param == param


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_a_missing_field_is_named(path: str) -> None:
    """By its own name."""
    with pytest.raises(RequestInvalid, match="is missing"):
        all_dialects(BOUNDS)[path].check(b'{"model": "bot"}')


def test_what_an_answer_holds_may_come_back_as_history() -> None:
    """Clients send a message of an answer whole, with its empty members."""
    answered = {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "annotations": None,
        "audio": None,
        "function_call": None,
        "reasoning": None,
        "tool_calls": [{**CALL, "index": 0}],
    }
    messages = [*HELLO, answered, {"role": "tool", "tool_call_id": "c1", "content": "42"}]
    assert sent(ask(CHAT, messages=messages, tools=[TOOL]))["messages"][1] == {
        "role": "assistant",
        "tool_calls": [CALL],
    }
    spoken = [
        {"role": "user", "content": "hello"},
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "phase": None,
            "content": [
                {"type": "output_text", "text": "one ", "annotations": [], "logprobs": None},
                {"type": "output_text", "text": "two", "annotations": [], "logprobs": []},
            ],
        },
        {"id": "rs_1", "type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"id": "fc_1", "type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "42"}]},
    ]
    assert sent(ask(RESPONSES, input=spoken))["input"] == [
        {"type": "message", "role": "user", "content": "hello"},
        {"type": "message", "role": "assistant", "content": "one two"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "42"},
    ]


def test_marks_for_a_cache_are_dropped() -> None:
    """Blocks go on without what does nothing here, and otherwise as they came."""
    mark = {"cache_control": {"type": "ephemeral"}}
    checked = ask(
        MESSAGES,
        system=[{"type": "text", "text": "s", **mark}],
        tools=[{"name": "f", "input_schema": SCHEMA, **mark}],
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a", **mark}]},
            {"role": "assistant", "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": "x"}}]},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "c", "content": [{"type": "text", "text": "r", **mark}]}
                ],
            },
        ],
        metadata={"user_id": "u"},
    )
    upstream = sent(checked)
    assert "cache_control" not in json.dumps(upstream)
    assert upstream["messages"][1]["content"] == [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": "x"}}]
    assert upstream["tools"] == [{"name": "f", "input_schema": SCHEMA}]
    assert checked.affinity == "u"


def test_without_tools_no_answer_is_read_for_calls() -> None:
    """vLLM's Messages API would look for calls in text where tool_choice is absent."""
    assert sent(ask(MESSAGES))["tool_choice"] == {"type": "none"}


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES])
def test_auto_needs_the_operators_parser(path: str) -> None:
    """Without one, a call must be required or named; the refusal says so."""
    plain = Bounds(max_output_tokens=100)
    tools = {
        CHAT: [TOOL],
        RESPONSES: [{"type": "function", "name": "f", "parameters": SCHEMA}],
        MESSAGES: [{"name": "f", "input_schema": SCHEMA}],
    }[path]
    required = {"type": "any"} if path == MESSAGES else "required"
    assert refused(path, plain, tools=tools).own_code == "unsupported_parameter"
    assert sent(ask(path, plain, tools=tools, tool_choice=required))["tools"] == tools
    assert sent(ask(path, tools=tools))["tools"] == tools


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "object", "patternProperties": {"(a+)+$": {}}},
        {"enum": list(range(MOST_CHOICES + 1))},
        {"description": "x" * 8_001},
        {"type": "array", "maxItems": 1_001},
        {"type": "string", "maxLength": 1_001},
        {"type": "object", "properties": {f"k{n}": {"type": "string", "maxLength": 60 + n} for n in range(5)}},
        {"type": "array", "items": {"type": "string", "maxLength": 255, "minLength": 1}, "maxItems": 9}
        | {"properties": {"k": {"maxLength": 64}}},
        {"type": "object", "properties": {f"k{n}": {"type": "integer"} for n in range(210)}},
        {"type": "object", "properties": {f"k{n}": {"type": "string", "maxLength": 200} for n in range(128)}},
        {"type": "object", "properties": {f"k{n}": {"type": "string", "maxLength": 701 + n} for n in range(9)}},
        {"type": "object", "properties": {f"k{n}": {"minLength": n, "maxLength": 200} for n in range(9)}},
        {"type": "object", "properties": {f"k{n}": {"minLength": n, "maxLength": 50} for n in range(9)}},
        {"type": "object", "properties": {f"k{n}": {"type": "number", "minimum": n} for n in range(180)}},
        {"type": "object", "properties": {f"k{n}": {"type": "number", "maximum": n * 1.23e300} for n in range(1, 120)}},
        {"type": "object", "properties": {"k" * 240: {}}, "additionalProperties": True},
        {"anyOf": [{"properties": {f"{n}{'k' * 20}": {} for n in range(6)}, "additionalProperties": {}}] * 2},
        {"properties": {f"name_{n}": {} for n in range(50)}, "required": [], "additionalProperties": {"type": "null"}},
        {"type": "object", "properties": {f"k{n}": {"type": "string", "format": "uri-template"} for n in range(34)}},
        {"anyOf": [{"type": "object", "properties": {f"k{n}": {"maxLength": 200} for n in range(63)}}] * 4},
        {"anyOf": [{}] * MOST_NODES},
        {"type": "array", "items": [{}, {}]},
        {"not": {}},
        {"$ref": "https://example.org/schema"},
        {"$ref": "#/$defs/missing"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}},
        {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}},
        {"type": "string", "format": "regex"},
        {"allOf": [{}, {}]},
        {"default": {"a": {"b": {"c": {"d": 1}}}}},
        "a string",
        None,
    ],
)
def test_a_costly_schema_is_refused(schema: Any) -> None:
    """What costs every tenant the engine's time to compile, or is none, in every place where a schema may stand."""
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert refused(response_format=shape).param == "response_format.json_schema.schema"
    spoken = {"format": {"type": "json_schema", "name": "x", "schema": schema}}
    assert refused(RESPONSES, text=spoken).param == "text.format.schema"
    assert refused(MESSAGES, output_config={"format": {"type": "json_schema", "schema": schema}}).param
    if schema is not None:
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        assert refused(tools=[tool], tool_choice="required").param == "tools[0].function.parameters"


@pytest.mark.parametrize(
    ("schema", "why"),
    [
        (
            {"type": "integer", "minimum": -1e30, "maximum": -1e30},
            "beyond 64 bits",
        ),  # ends llguidance, with its process
        ({"type": "integer", "maximum": 2**63}, "beyond 64 bits"),
        ({"type": ["null", "integer"], "minimum": float(-(2**63))}, "beyond 64 bits"),
        ({"type": "integer", "exclusiveMinimum": 2**63 - 1}, "beyond 64 bits"),
        ({"type": "integer", "minimum": 0.5}, "whole number"),
        ({"type": "integer", "minimum": 5, "maximum": 1}, "lower bound"),
        ({"type": "integer", "exclusiveMinimum": 1, "exclusiveMaximum": 2}, "lower bound"),
        ({"type": "number", "maximum": 3, "exclusiveMinimum": 3}, "lower bound"),
        ({"type": "number", "minimum": 2**53, "exclusiveMaximum": 2**53 + 1}, "lower bound"),
        ({"minimum": 10**400}, "too large"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength"),
        ({"type": "array", "items": {}, "minItems": 3, "maxItems": 2}, "minItems is above"),
        ({"type": "array", "minItems": 1}, "no schema in items"),
        ({"type": "array", "items": False, "prefixItems": [{}], "minItems": 2}, "no schema in items"),
        ({"type": "array", "prefixItems": [{}, {}], "maxItems": 1}, "prefixItems are more"),
        ({"type": "array", "prefixItems": [True]}, "prefixItems holds true"),
        ({"type": "array", "items": {"enum": []}}, "enum is empty"),
        ({"properties": {"a": {"anyOf": [{"type": "null"}, {"enum": []}]}}}, "enum is empty"),
        ({"type": "object", "properties": {"a": False}}, "false"),
        ({"anyOf": [{}, False]}, "false"),
        ({"type": "array", "prefixItems": [False]}, "false"),
    ],
)
def test_a_schema_that_no_value_fits_is_refused(schema: Any, why: str) -> None:
    """xgrammar raises for a part of it; vLLM would have begun some APIs' streams by then, if it lived."""
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"properties": {"part": schema}}}}
    told = refused(response_format=shape)
    assert told.param == "response_format.json_schema.schema"
    assert why in told.message


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1},
        {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 2},
        {"type": "integer", "minimum": 1.0, "maximum": 1e18},
        {"type": "number", "minimum": 0.5, "maximum": 0.5},
        {"type": "array", "items": {}, "minItems": 2, "maxItems": 2},
        {"type": "array", "items": True, "minItems": 1},
        {"type": "array", "prefixItems": [{}, {}], "minItems": 2, "maxItems": 2},
        {"type": "array", "items": False, "prefixItems": [{}], "minItems": 1},
        {"type": "object", "properties": {"a": True}, "additionalProperties": False},
        {"type": "string", "minLength": 2, "maxLength": 2},
    ],
)
def test_a_schema_that_one_value_fits_passes(schema: Any) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert sent(ask(CHAT, response_format=shape))["response_format"]["json_schema"]["schema"] == schema


@pytest.mark.parametrize("deep", ["items", "default"])
def test_a_deep_schema_is_refused(deep: str) -> None:
    """Nesting is bounded, in schemas that are only shown too: the engine's server parses with a recursive parser."""
    schema: dict[str, Any] = {}
    for _ in range(60):
        schema = {deep: schema}
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert refused(response_format=shape).param
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert "levels" in refused(tools=[tool]).message


def test_a_deep_argument_is_refused() -> None:
    """What a called function was given is bounded in depth."""
    deep = "[" * 100 + "]" * 100
    call = {**CALL, "function": {"name": "f", "arguments": deep}}
    assert "levels" in refused(messages=[*HELLO, {"role": "assistant", "tool_calls": [call]}]).message
    item = {"type": "function_call", "call_id": "c", "name": "f", "arguments": deep}
    assert "levels" in refused(RESPONSES, input=[item]).message
    used = {"type": "tool_use", "id": "c", "name": "f", "input": {"a": json.loads(deep)}}
    assert "levels" in refused(MESSAGES, messages=[{"role": "assistant", "content": [used]}]).message


def calling(arguments: str, number: int = 1) -> list[dict[str, Any]]:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    turns = [{"role": "assistant", "tool_calls": [call] * 100}] * (number // 100)
    return [*HELLO, *turns, {"role": "assistant", "tool_calls": [call] * (number % 100 or 1)}]


def using(given: Any, number: int = 1) -> list[dict[str, Any]]:
    block = {"type": "tool_use", "id": "c1", "name": "f", "input": given}
    return [{"role": "assistant", "content": [block] * min(number, 200)}] * -(-number // 200)


def of_function(arguments: str, number: int = 1) -> list[dict[str, Any]]:
    return [{"type": "function_call", "call_id": "c", "name": "f", "arguments": arguments}] * number


WIDE = f"[{'[],' * 40}{'0,' * 1_000}0]"
"""More than 32 brackets, 2,123 bytes."""
BRACKETS = "[" + "[]," * 900 + "0]"
PART = {"type": "text", "text": "x"}


@pytest.mark.parametrize(
    ("path", "fields", "told"),
    [
        (CHAT, {"messages": calling("{}", MOST_CALLS + 50)}, f"{MOST_CALLS} calls"),
        (MESSAGES, {"messages": using({}, MOST_CALLS + 50)}, f"{MOST_CALLS} calls"),
        (CHAT, {"messages": calling(WIDE, 130)}, f"{MOST_WALKED_BYTES} bytes"),
        (MESSAGES, {"messages": using([[]] * 40 + ["x" * 2_000], 140)}, f"{MOST_WALKED_BYTES} bytes"),
        (RESPONSES, {"input": of_function(WIDE, 130)}, f"{MOST_WALKED_BYTES} bytes"),
        (CHAT, {"messages": calling(BRACKETS, 20)}, f"{MOST_BRACKETS} brackets"),
        (MESSAGES, {"messages": using(json.loads(BRACKETS), 20)}, f"{MOST_BRACKETS} brackets"),
        (CHAT, {"messages": [{"role": "user", "content": [PART] * 256}] * 17}, f"{MOST_PARTS} parts"),
        (CHAT, {"messages": [{"role": "user", "content": [{**PART, "text": '"' * MOST_ESCAPES}]}] * 2}, "escaped"),
        (RESPONSES, {"input": [{"role": "user", "content": '"' * (2 * MOST_ESCAPES + 1)}]}, "escaped"),
        (COMPLETIONS, {"prompt": [1] * (MOST_TOKENS + 1)}, f"{MOST_TOKENS} tokens"),
        (COMPLETIONS, {"prompt": [1] * (MOST_TOKENS + MOST_VALUES + 2)}, "values"),
        (CHAT, {"messages": [{"role": "user", "content": [0] * (MOST_VALUES + 9)}]}, f"{MOST_VALUES} values"),
        (MESSAGES, {"messages": using({"a": [0] * (MOST_VALUES + 9)})}, f"{MOST_VALUES} values"),
        (RESPONSES, {"input": [*HELLO, *[{"type": "reasoning", "summary": [{}] * 200}] * 400]}, "values"),
        (CHAT, {"messages": HELLO * 1_025}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 80}] * 1_025}, "1024"),
        (RESPONSES, {"input": [{"role": "user", "content": "x" * 80}] * 1_025}, "1024"),
    ],
)
def test_what_would_cost_the_event_loop_much_is_refused(path: str, fields: dict[str, Any], told: str) -> None:
    """Calls, their arguments, parts, escapes, tokens and values are bounded in each request as a whole."""
    assert told in refused(path, Bounds(calls_tools=True), **fields).message


def test_an_agents_long_conversation_passes() -> None:
    """500 calls with brackets in each one's arguments, 240 kB in all, are sent as they came."""
    arguments = json.dumps({"path": "a.py", "text": "def f(x):\n    return {'a': [x]}\n" * 13})
    call = {"id": "c1", "type": "function", "function": {"name": "edit", "arguments": arguments}}
    turn = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "c1", "content": "done"}]
    assert sent(ask(CHAT, Bounds(calls_tools=True), messages=[*HELLO, *turn * 500]))["messages"] == [
        *HELLO,
        *turn * 500,
    ]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (CHAT, {"messages": [*HELLO, {"role": "assistant", "content": "x" * 99_000, "tool_calls": [CALL]}]}),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 900}] * 100}]}),
        (COMPLETIONS, {"prompt": "x" * 99_000}),
        (COMPLETIONS, {"prompt": [12_345] * 20_000}),
        (MESSAGES, {"system": "s" * 70_000, "messages": [{"role": "user", "content": "x" * 9_000}]}),
        (MESSAGES, {"messages": using({"a": "x" * 900}, 100)}),
        (RESPONSES, {"input": "x" * 99_000, "instructions": "i" * 70_000}),
        ("/v1/tokenize", {"messages": [{"role": "user", "content": "x" * 99_000}]}),
    ],
)
def test_a_large_request_is_sent_as_it_came(path: str, fields: dict[str, Any]) -> None:
    """What is decoded in parts is whole again."""
    told = sent(ask(path, Bounds(calls_tools=True), **fields))
    assert {name: told[name] for name in fields} == fields


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (CHAT, {"messages": [*HELLO, {"role": "root", "content": "x" * 99_000}]}, "messages[1].role"),
        (CHAT, {"messages": None, "tools": [TOOL] * 600}, "messages"),
        (CHAT, {"messages": "x" * 99_000}, "messages"),
        (CHAT, {"messages": [], "metadata": {"a": "x" * 9_000}, "tools": [TOOL] * 600}, "metadata[...]"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 99_000}], "unheard_of": 1}, "unheard_of"),
        (CHAT, {"messages": [{"role": "user", "content": [PART] * 255 + [{"type": "image", "text": "x" * 99_000}]}]},
         "messages[0].content[255].type"),
        (COMPLETIONS, {"prompt": None, "user": "x" * 99_000}, None),
        (RESPONSES, {"input": [*HELLO, {"role": "root", "content": "x" * 99_000}]}, "input[1].role"),
    ],
)  # fmt: skip
def test_a_fault_of_a_large_request_is_named(path: str, fields: dict[str, Any], param: str | None) -> None:
    """As in a small one."""
    assert refused(path, **fields).param == param


def test_a_long_list_is_decoded_no_further_than_its_bound() -> None:
    """The first item too many ends it, whatever follows."""
    parts = [{"type": "text", "text": "x" * 80}] * 256
    beyond = [{"type": "image"}] * 2
    assert "at most length 256" in refused(messages=[{"role": "user", "content": [*parts, *beyond]}]).message
    calls = [{**CALL, "id": "c" * 100}] * 128 + [{"id": "c"}] * 2
    assert "at most length 128" in refused(messages=[{"role": "assistant", "tool_calls": calls}]).message


ANY_JSON = st.recursive(
    st.none() | st.integers(0, 9) | st.text('"\\[]{},x', max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('"\\[]{},', max_size=3), inner, max_size=3),
    max_leaves=20,
)


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth_of, inner), default=0)


@given(ANY_JSON, st.integers(0, 6))
def test_depth_is_told_without_decoding(value: Any, most: int) -> None:
    """Brackets within texts are none, however their quotes are escaped."""
    assert is_deeper(json.dumps(value).encode(), most) == (depth_of(value) > most)


@given(ANY_JSON, st.integers(0, 12))
def test_values_are_told_from_commas_in_a_text(value: Any, most: int) -> None:
    """Only what stands between values counts."""

    def commas(value: Any) -> int:
        inner = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        return max(0, len(inner) - 1) + sum(map(commas, inner))

    refused = False
    try:
        hold_values(json.dumps(value).encode(), most)
    except RequestInvalid:
        refused = True
    assert refused == (commas(value) > most)


@pytest.mark.parametrize("role", [" - at `" * 9_000, "x" * 60_000, "missing required field `a`", "unknown field `b`"])
def test_a_long_word_of_the_clients_is_not_read_for_its_place(role: str) -> None:
    """msgspec's sentence quotes it: what it says itself stands at its beginning and end."""
    told = refused(messages=[{"role": role, "content": "x"}])
    assert told.param == "messages[0].role"
    assert len(told.message) < 300
    assert len(cut(f"Invalid value '{role}' - at `$.role`")) <= 701


def test_many_commas_among_many_quotes_are_values() -> None:
    """They are not told apart where that would cost too much; one text may have as many quotes as it likes."""
    rows = {"role": "user", "content": '1,2,3,"b\\"\n' * (MOST_VALUES // 2)}
    many = [{"role": "user", "content": [PART] * 10}] * (MOST_QUOTES // 20)
    assert "texts" in refused(messages=[rows, *many]).message
    assert "values" in refused(messages=[{"role": "user", "content": [0] * (MOST_VALUES + 9)}]).message
    table = "\n".join(",".join(f'"{n}"' for n in range(12)) for _ in range(8_500))
    told = refused(messages=[{"role": "user", "content": table}]).message
    assert f"{table.count(',') + 2} commas" in told
    assert f"{MOST_MARKS} quotes and backslashes" in told
    for text in ("1,2\n" * (MOST_VALUES + MOST_QUOTES), rows["content"], table[: len(table) // 2]):
        assert sent(ask(CHAT, messages=[{"role": "user", "content": text}]))["messages"][0]["content"] == text


def test_an_escaped_character_counts_once() -> None:
    """JSON within JSON within arguments, where each quote has three backslashes; and what a result's list holds."""
    inner = json.dumps({f"k{number}": f"v{number}" for number in range(12_000)})
    said = calling(json.dumps({"content": inner}))
    assert sent(ask(CHAT, messages=said))["messages"][-1] == said[-1]
    lines = "\n" * (MOST_ESCAPES // 2 + 9)
    result = {"type": "tool_result", "tool_use_id": "c", "content": [{**PART, "text": lines}]}
    told = [{"role": "user", "content": lines}, *using({}), {"role": "user", "content": [result]}]
    assert sent(ask(MESSAGES, messages=told))["messages"][-1]["content"][0]["content"][0]["text"] == lines


DEEP = "[" * 100 + "]" * 100


@pytest.mark.parametrize(
    "calls",
    [
        [DEEP.replace("[", "\\u005b")],
        ['"' + "[" * 40, DEEP, "]" * 40 + '"'],
        ["[" * 40 + "]" * 39],
        ['["\\\\"' + ",[" * 50 + "]" * 51],
        ["[" * 2_000],
    ],
)
def test_no_argument_hides_the_depth_of_another(calls: list[str]) -> None:
    """They are looked at together, and each is read as a parser reads it alone."""
    bodies = [f'{{"id":"c","function":{{"name":"f","arguments":{json.dumps(one)}}}}}' for one in calls]
    bodies = [body.replace("\\\\u005b", "\\u005b") for body in bodies]
    data = f'{{"model":"bot","messages":[{{"role":"assistant","tool_calls":[{",".join(bodies)}]}}]}}'
    with pytest.raises(RequestInvalid, match="levels deep"):
        all_dialects(BOUNDS)[CHAT].check(data.encode())


@pytest.mark.parametrize(
    "said",
    [
        {"reasoning": 3},
        {"reasoning_content": {}},
        {"refusal": []},
        {"tool_calls": 3},
        {"tool_calls": [{**CALL, "function": {"name": "f", "arguments": {}}}]},
    ],
)
def test_what_a_model_is_said_to_have_said_is_text(said: dict[str, Any]) -> None:
    """Thoughts, refusals and arguments are strings; null is as good as none."""
    param = refused(messages=[*HELLO, {"role": "assistant", "content": "x", **said}]).param or ""
    assert param.startswith("messages[1].")
    told = sent(ask(CHAT, messages=[*HELLO, {"role": "assistant", "content": "x", **dict.fromkeys(said)}]))
    assert told["messages"][1] == {"role": "assistant", "content": "x"}


def test_a_schema_that_is_only_shown_may_hold_any_keyword() -> None:
    """tool_choice auto compiles nothing but strict tools."""
    schema = {"type": "object", "properties": {"a": {"type": "string", "pattern": "^a"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert sent(ask(CHAT, tools=[tool]))["tools"] == [tool]
    strict = {"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}
    assert refused(tools=[strict]).param == "tools[0].function.parameters"


def test_a_text_may_have_255_characters() -> None:
    """As many databases' columns have, so as many schemas say."""
    fields = {f"field_{n}": {"type": "string", "maxLength": 255} for n in range(40)}
    schema = {"type": "object", "properties": fields}
    held = {"type": "json_schema", "json_schema": {"name": "row", "schema": schema}}
    assert sent(ask(CHAT, response_format=held))["response_format"]["json_schema"]["schema"] == schema


def test_a_schema_of_an_open_object_passes() -> None:
    """Of a dozen names, and a dictionary, which has none; numbers as far as a double goes."""
    fields = {f"field_{n:02}": {"type": "number", "maximum": 1.7976931348623157e308} for n in range(12)}
    row = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": True}
    schema = {"type": "object", "properties": {"row": row, "by_name": {"additionalProperties": {"type": "string"}}}}
    held = {"type": "json_schema", "json_schema": {"name": "row", "schema": schema}}
    assert sent(ask(CHAT, response_format=held))["response_format"]["json_schema"]["schema"] == schema


def test_a_schema_of_a_few_dozen_optional_fields_passes() -> None:
    """Texts, numbers within bounds, addresses and times, in a list of objects."""
    kinds: list[dict[str, Any]] = [
        {"type": "string", "maxLength": 64},
        {"type": "integer", "minimum": 0, "maximum": 100},
        {"type": "string", "format": "date-time"},
        {"anyOf": [{"type": "number"}, {"type": "null"}]},
        {"enum": ["a", "b"]},
    ]
    fields = {f"field_{n}": kinds[n % len(kinds)] for n in range(48)}
    row = {"type": "object", "properties": {**fields, "mail": {"type": "string", "format": "email"}}}
    schema = {"type": "object", "properties": {"rows": {"type": "array", "items": row}, "again": row}}
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    assert sent(ask(CHAT, response_format=shape))["response_format"] == shape


def test_a_schema_of_pydantic_passes() -> None:
    """Definitions, references (through a list to themselves too), optional and annotated fields, in their order."""
    schema = {
        "$defs": {
            "Node": {
                "properties": {
                    "children": {"items": {"$ref": "#/$defs/Node"}, "title": "Children", "type": "array"},
                    "kind": {"enum": ["a", "b"], "title": "Kind", "type": "string"},
                    "when": {"format": "date-time", "type": "string"},
                    "size": {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "null"}], "default": None},
                    "pattern": {"type": "string"},
                },
                "required": ["children", "kind"],
                "type": "object",
                "additionalProperties": False,
            }
        },
        "properties": {"root": {"$ref": "#/$defs/Node"}},
        "title": "Tree",
        "type": "object",
    }
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    upstream = ask(CHAT, response_format=shape).upstream_body(model="a", cache_salt="s", context_length=10)
    assert json.dumps(schema, separators=(",", ":")).encode() in upstream


def test_an_opt_in_field_is_the_operators_to_allow() -> None:
    """Refused with a reason until it is named in the settings; then it has its own bounds."""
    values: dict[str, Any] = {
        "allowed_token_ids": [1],
        "bad_words": ["x"],
        "chat_template_kwargs": {"enable_thinking": False},
        "reasoning": {"effort": "low"},
        "reasoning_effort": "low",
        "thinking": {"type": "enabled", "budget_tokens": 2_000},
        "prompt_logprobs": 1,
        "thinking_token_budget": 5,
        "truncate_prompt_tokens": 5,
    }
    open_bounds = Bounds(max_output_tokens=4_000, calls_tools=True, allowed_fields=frozenset(OPT_IN))
    for kind in DIALECTS:
        for name in kind.opt_in:
            value = values.get(name, True)
            assert refused(kind.path, **{name: value}).param in (name, f"{name}.type")
            assert sent(ask(kind.path, open_bounds, **{name: value}))[name] == value
            assert refused(kind.path, open_bounds, **{name: {"evil": 1}}).param
    assert refused(bounds=open_bounds, chat_template_kwargs={"tools": []}).param == "chat_template_kwargs.tools"


def test_a_count_names_thoughts_as_the_engine_does() -> None:
    """vLLM renames them for a chat alone; where both names are sent, the new one holds."""
    for thought, told in (
        ({"reasoning_content": "a"}, {"reasoning": "a"}),
        ({"reasoning_content": "a", "reasoning": "b"}, {"reasoning": "b"}),
        ({"reasoning": "b"}, {"reasoning": "b"}),
        ({"reasoning_content": None}, {}),
    ):
        said = {"role": "assistant", "content": "x"}
        counted = sent(ask("/v1/tokenize", messages=[*HELLO, {**said, **thought}, *HELLO]))
        assert counted["messages"][1] == {**said, **told}


def test_what_is_neither_prompt_nor_tools_stays_small() -> None:
    """A megabyte of anything else is refused before it is decoded."""
    assert "at most" in refused(logit_bias={str(n): 1 for n in range(20_000)}).message
    assert refused(tools=[TOOL] * 2_000).param == "tools"


@pytest.mark.parametrize("path", LEAST)
@pytest.mark.parametrize("data", [b"", b"{", b"null", b"[]", b'{"model": NaN}', b"\xff", b"[" * 100_000])
def test_what_is_not_a_json_object_is_told(path: str, data: bytes) -> None:
    """No body makes anything but a RequestInvalid."""
    with pytest.raises(RequestInvalid):
        all_dialects(BOUNDS)[path].check(data)


def test_text_is_utf8() -> None:
    """It goes on as it came, so it is held here."""
    good = '{"model":"bot","messages":[{"role":"user","content":"\\u8a9e 語 \\"\\n"}]}'.encode()
    assert sent(all_dialects(BOUNDS)[CHAT].check(good))["messages"][0]["content"] == '語 語 "\n'
    for bad in (b"\xff", b"\xed\xa0\x80", b"\\ud800", b"\x01"):
        with pytest.raises(RequestInvalid):
            all_dialects(BOUNDS)[CHAT].check(good.replace(b"8a9e", b"8a9e" + bad))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
PARTS = st.sampled_from(
    [
        "x",
        None,
        [{"type": "text", "text": "x"}],
        [{"type": "input_text", "text": "x"}],
        [{"type": "image_url", "image_url": {}}],
        [{"type": "tool_use", "id": "c", "name": "f", "input": {"model": "evil"}}],
        [{"type": "tool_result", "tool_use_id": "c", "content": "r"}],
    ]
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "developer"]), "content": PARTS},
    optional={"tool_calls": st.just([CALL]), "tool_call_id": st.just("c1"), "name": JSON, "cache_salt": JSON},
)
TOOLS = st.sampled_from([[TOOL], [{"type": "function", "name": "f"}], [{"name": "f", "input_schema": {}}], "x"])
LIKELY = {
    "messages": st.lists(MESSAGE, max_size=3),
    "input": st.just("x") | st.lists(MESSAGE, max_size=3),
    "tools": TOOLS,
    "tool_choice": st.sampled_from(["auto", "none", {"type": "auto"}, {"type": "any"}]),
    "max_tokens": st.integers(0, 120),
    "stream": st.booleans(),
    "stop": st.text(max_size=3),
}


def bodies(kind: type[Dialect]) -> st.SearchStrategy[dict[str, Any]]:
    names = {*REFUSED, *OPT_IN, *GATEWAY_SET, *(field.name for field in fields_of(kind.request))} - {"model"}
    field = st.sampled_from(sorted(names)).flatmap(lambda name: st.tuples(st.just(name), LIKELY.get(name, JSON)))
    return st.lists(field | st.tuples(st.text(max_size=10), JSON), max_size=5).map(dict)


def check_random_body(kind: type[Dialect], fields: dict[str, Any]) -> None:
    try:
        checked = ask(kind.path, **fields)
        upstream = sent(checked)
    except RequestInvalid:
        return
    allowed = {field.name for field in fields_of(kind.request)} | {"cache_salt"}
    if kind is InputTokens:
        allowed = {field.name for field in fields_of(AskedTokens)}
    assert upstream.keys() <= allowed
    assert upstream["model"] == "a-1"
    assert upstream.get("cache_salt") == ("s" if kind.generates else None)
    assert not upstream.keys() & (kind.refused.keys() | kind.opt_in) - allowed
    for message in upstream.get("messages", []):
        assert message.keys() <= {"role", "content", "name", "tool_calls", "tool_call_id"}


@pytest.mark.parametrize("kind", DIALECTS, ids=lambda kind: kind.path)
def test_random_bodies_are_refused_or_sent_whole(kind: type[Dialect]) -> None:
    """Whatever is accepted makes a body that names only allowed fields (150 a dialect; under `full` 20,000 in all)."""
    settings(max_examples=150)(given(bodies(kind))(lambda fields: check_random_body(kind, fields)))()


@pytest.mark.full
@pytest.mark.timeout(1_800)
@pytest.mark.parametrize("kind", DIALECTS, ids=lambda kind: kind.path)
def test_twenty_thousand_random_bodies(kind: type[Dialect]) -> None:
    """The same at full scale."""
    settings(max_examples=20_000 // len(DIALECTS))(
        given(bodies(kind))(lambda fields: check_random_body(kind, fields))
    )()
