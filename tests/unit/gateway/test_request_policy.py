"""What a tenant may ask, field by field."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import ContextLengthExceeded, RequestInvalid
from gateway.request_policy import REFUSED, ChatRequest, Checked, CompletionRequest, RequestPolicy

BOUNDS = {"max_messages": 8, "max_output_tokens": 100, "max_choices": 4, "max_schema_bytes": 1_000}
CHAT = RequestPolicy(ChatRequest, **BOUNDS)
COMPLETION = RequestPolicy(CompletionRequest, **BOUNDS)
HELLO = [{"role": "user", "content": "hello"}]


def chat(**fields: Any) -> Checked:
    return CHAT.check(json.dumps({"model": "bot", "messages": HELLO, **fields}).encode())


def sent(checked: Checked, context_length: int = 1_000) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(
        checked.upstream_body(model="a-1", cache_salt="s", request_id="r", context_length=context_length)
    )
    return body


def refused(**fields: Any) -> RequestInvalid:
    with pytest.raises(RequestInvalid) as error:
        chat(**fields)
    return error.value


def test_the_upstream_body_is_built() -> None:
    """It has what was checked and what the gateway sets, and nothing else."""
    assert sent(chat(temperature=0.5, user="u", metadata={"a": "b"}, store=False)) == {
        "model": "a-1",
        "cache_salt": "s",
        "request_id": "r",
        "messages": HELLO,
        "temperature": 0.5,
        "max_tokens": 100,
    }


def test_a_length_is_always_sent() -> None:
    """Without one an answer would run to the context's end; a plain completion has OpenAI's default."""
    assert sent(chat())["max_tokens"] == 100
    assert sent(chat(), context_length=64)["max_tokens"] == 64
    assert sent(chat(max_completion_tokens=7))["max_tokens"] == 7
    completion = COMPLETION.check(b'{"model": "bot", "prompt": "x"}')
    assert sent(completion)["max_tokens"] == 16


def test_a_length_that_the_model_cannot_hold_is_told() -> None:
    """The client's own max_tokens is never cut in silence."""
    with pytest.raises(ContextLengthExceeded, match="64 tokens"):
        sent(chat(max_tokens=65), context_length=64)


@pytest.mark.parametrize("field", sorted(REFUSED))
def test_a_refused_field_is_named_with_its_reason(field: str) -> None:
    """Whoever sends it learns that it is known, and why it is not taken."""
    error = refused(**{field: 1})
    assert (error.param, error.own_code) == (field, "unsupported_parameter")
    assert REFUSED[field] in error.message


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"cache_salt": "x"}, "cache_salt"),
        ({"priority": -1}, "priority"),
        ({"request_id": "x"}, "request_id"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"messages": [{"role": "user", "content": "x", "evil": 1}]}, "messages[0].evil"),
        ({"messages": []}, "messages"),
        ({"messages": HELLO * 9}, "messages"),
        ({"messages": [{"role": "root", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"model": ""}, "model"),
        ({"model": 3}, "model"),
        ({"n": 5}, "n"),
        ({"n": 0}, "n"),
        ({"max_tokens": 101}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"logit_bias": {"not a number": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": ""}, "stop"),
        ({"top_logprobs": 5}, "top_logprobs"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
    ],
)
def test_a_bad_value_is_named(fields: dict[str, Any], param: str) -> None:
    """The error's param is the field, as OpenAI writes it."""
    found = refused(**fields).param
    assert found is not None
    assert found.partition("[...]")[0] == param


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "(a+)+$"},
        {"type": "object", "patternProperties": {"(a+)+$": {}}},
        {"enum": list(range(257))},
        {"description": "x" * 1_001},
    ],
)
def test_a_costly_schema_is_refused(schema: dict[str, Any]) -> None:
    """Regular expressions, long choices and big schemas cost every tenant the engine's time."""
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert refused(response_format=shape).param == "response_format"


def test_a_deep_schema_is_refused() -> None:
    """Nesting is bounded."""
    schema: dict[str, Any] = {}
    for _ in range(20):
        schema = {"items": schema}
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    assert "levels" in refused(response_format=shape).message


def test_a_schema_may_have_a_property_called_pattern() -> None:
    """The keyword is refused, not the word."""
    schema = {"type": "object", "properties": {"pattern": {"type": "string"}}}
    assert chat(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"[]", b'{"model": NaN}', b"\xff", b"[" * 100_000])
def test_what_is_not_a_json_object_is_told(body: bytes) -> None:
    """No body makes anything but a RequestInvalid."""
    with pytest.raises(RequestInvalid):
        CHAT.check(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(sorted({*REFUSED, "messages", "n", "stop", "logit_bias", "response_format", "stream_options"}))


@given(st.dictionaries(FIELDS | st.text(max_size=10), JSON, max_size=6))
@settings(max_examples=500, deadline=None)
def test_random_bodies_are_refused_or_sent_whole(fields: dict[str, Any]) -> None:
    """Whatever is accepted makes a body that names only allowed fields (500 bodies here; 20,000 under `full`)."""
    check_random_body(fields)


@pytest.mark.full
@given(st.dictionaries(FIELDS | st.text(max_size=10), JSON, max_size=6))
@settings(max_examples=20_000, deadline=None)
def test_twenty_thousand_random_bodies(fields: dict[str, Any]) -> None:
    """The same at full scale."""
    check_random_body(fields)


def check_random_body(fields: dict[str, Any]) -> None:
    try:
        checked = CHAT.check(json.dumps({"model": "bot", "messages": HELLO, **fields}).encode())
    except RequestInvalid:
        return
    body = sent(checked)
    assert body["model"] == "a-1"
    assert not set(body) & set(REFUSED)
