"""Answers, streams and errors in the words of each API."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapter_store.errors import StorageFull
from gateway.dialects import DIALECTS, Bounds, Checked, Dialect, all_dialects
from gateway.errors import (
    ContextLengthExceeded,
    GatewayError,
    KeyInvalid,
    ModelUnknown,
    ReplicaFailed,
    ReplicaUnavailable,
    RequestInvalid,
)
from gateway.tokens import PromptDetails, Usage
from loadtests.fake.speech import named, speech_of

NAME = "a-0123456789abcdef"
HOSTILE = f'","model":"{NAME}" event: error\ndata: {{"error":1}}\n\nevent: message_stop\ndata: {{}}\n\ndata: [DONE]\n\n'
CHAT, COMPLETIONS, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
TOOLS = [{"type": "function", "function": {"name": "say"}}]
MEMORY = all_dialects(Bounds())
STREAMED = [RESPONSES, MESSAGES]
BEGINNINGS = {
    RESPONSES: ("response.created", "response.in_progress"),
    MESSAGES: ("message_start", "content_block_start"),
}


def asked(path: str, **more: Any) -> Checked:
    least: dict[str, dict[str, Any]] = {
        RESPONSES: {"input": "x" * 400},
        MESSAGES: {"messages": [{"role": "user", "content": "x" * 400}], "max_tokens": 5},
        "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
        "/v1/responses/input_tokens": {"input": "x"},
        "/v1/tokenize": {"prompt": "x"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/v1/completions": {"prompt": "x"},
    }
    return MEMORY[path].check(json.dumps({"model": 'my "bot"', **least[path], **more}).encode())


def engine_stream(path: str) -> bytes:
    speech = speech_of(path, {"model": NAME})
    return b"".join(
        [
            *speech.opening(),
            *speech.begin(9),
            *(speech.token(t, 9, 1) for t in ("one", HOSTILE, "x")),
            *speech.end("one", 9, 3),
        ]
    )


def data_of(events: bytes) -> list[dict[str, Any]]:
    return [json.loads(event.partition(b"\ndata: ")[2]) for event in events.split(b"\n\n")[:-1]]


@pytest.mark.parametrize("path", STREAMED)
@given(st.data())
def test_a_stream_is_the_same_however_it_is_cut(path: str, data: st.DataObject) -> None:
    """Events may arrive in any pieces; a model's words are never taken for structure; the inner name never shows."""
    whole = engine_stream(path)
    cuts = data.draw(st.lists(st.integers(0, len(whole)), max_size=12))
    stream = MEMORY[path].stream(NAME, asked(path, stream=True))
    out = b"".join([stream.feed(whole[a:b]) for a, b in pairwise([0, *sorted(cuts), len(whole)])])
    out = stream.opening + out
    told = data_of(out)
    kinds = [event["type"] for event in told]
    assert kinds[:2] == list(BEGINNINGS[path])
    said = [event["delta"] for event in told if event["type"].endswith("delta") and event["type"] != "message_delta"]
    assert [one if isinstance(one, str) else one["text"] for one in said] == ["one", HOSTILE, "x"]
    assert out.replace(json.dumps(HOSTILE).encode()[1:-1], b"").count(NAME.encode()) == 0
    named_models = [event.get("response", event.get("message", {})).get("model") for event in told]
    assert {model for model in named_models if model} == {'my "bot"'}
    assert stream.finished
    assert stream.usage is not None
    assert (stream.usage.prompt_tokens, stream.usage.completion_tokens) == (9, 3)


def test_what_a_response_opens_with_waits_for_its_engine() -> None:
    """vLLM 0.32 writes two events before the engine has given anything: they are no output, and have no usage."""
    speech = speech_of(RESPONSES, {"model": NAME})
    stream = MEMORY[RESPONSES].stream(NAME, asked(RESPONSES, stream=True))
    assert [stream.feed(event) for event in speech.opening()] == [b"", b""]
    assert stream.usage is None
    assert [event["type"] for event in data_of(stream.opening)] == list(BEGINNINGS[RESPONSES])
    assert stream.feed(next(speech.begin(9))).startswith(b"event: response.output_item.added\n")


@pytest.mark.parametrize("path", STREAMED)
def test_a_stream_that_has_not_begun_has_no_usage(path: str) -> None:
    """The engine never said anything."""
    assert MEMORY[path].stream(NAME, asked(path, stream=True)).usage is None


@pytest.mark.parametrize("path", STREAMED)
def test_a_cut_stream_is_counted_by_its_events(path: str) -> None:
    """What was not told is estimated: the tokens that passed, the prompt by its length where it is not known."""
    speech = speech_of(path, {"model": NAME})
    stream = MEMORY[path].stream(NAME, asked(path, stream=True))
    for event in (*speech.begin(9), speech.token("a", 9, 1), speech.token("b", 9, 2)):
        stream.feed(event)
    usage = stream.usage
    assert usage is not None
    assert not stream.finished
    assert usage.completion_tokens == 2
    assert usage.prompt_tokens == 9 if path == MESSAGES else 100 <= usage.prompt_tokens <= 120


@pytest.mark.parametrize("path", STREAMED)
@pytest.mark.parametrize(
    "broken",
    [
        named("error", error={"message": "CUDA /opt/secret"}),
        b'data: {"error":{"message":"/opt/secret"}}\n\n',
        named("response.failed", response={}),
        b"event: response.created\ndata: {garbled\n\n",
        b"event: message_start\ndata: {garbled\n\n",
        b"x" * (3 << 20),
    ],
)
def test_a_fault_of_the_engine_stays_inside(path: str, broken: bytes) -> None:
    """Its text is replaced by ours, and an event without end does not fill our memory."""
    stream = MEMORY[path].stream(NAME, asked(path, stream=True))
    told = ""
    try:
        told = stream.feed(broken).decode()
    except ReplicaFailed as error:
        told = str(error)
    assert "secret" not in told
    assert "event" not in told
    assert not stream.finished


def test_a_long_last_event_is_whole() -> None:
    """A response's last event repeats its answer with every alternative, and comes in pieces."""
    dialect = all_dialects(Bounds())["/v1/responses"]
    body = b'{"model": "bot", "input": "hi", "stream": true, "max_output_tokens": 4096}'
    stream = dialect.stream("a-0", dialect.check(body))
    response = {
        "object": "response",
        "model": "a-0",
        "output": "x" * (8 << 20),
        "usage": {"input_tokens": 1, "output_tokens": 4_096},
    }
    data = json.dumps({"type": "response.completed", "sequence_number": 1, "response": response})
    event = f"event: response.completed\ndata: {data}\n\n".encode()
    told = b"".join(stream.feed(event[begin : begin + 65_536]) for begin in range(0, len(event), 65_536))
    assert stream.finished
    assert len(told) > 8 << 20
    assert stream.usage == Usage(1, 4_096, PromptDetails(None))


@pytest.mark.parametrize("path", STREAMED)
def test_an_unknown_event_is_not_passed_on(path: str) -> None:
    """What a newer engine says beside the API may hold anything."""
    stream = MEMORY[path].stream(NAME, asked(path, stream=True))
    assert stream.feed(named("engine.secret", path="/opt/secret")) == b""


def test_a_whole_message_is_told() -> None:
    """In Anthropic's form: its own id, the tenant's model, every member of usage."""
    inner = {
        "id": "chatcmpl-abc",
        "type": "message",
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"model": NAME}}],
        "model": NAME,
        "stop_reason": "tool_use",
        "usage": {"input_tokens": 2, "output_tokens": 3, "cache_read_input_tokens": 16},
        "kv_transfer_params": {"inner": 1},
    }
    body, usage = MEMORY[MESSAGES].whole(NAME, asked(MESSAGES), json.dumps(inner).encode())
    told = json.loads(body)
    assert (told["id"], told["model"]) == ("msg_abc", 'my "bot"')
    assert told["content"] == inner["content"]
    assert told["usage"]["cache_read_input_tokens"] == 16
    assert told.keys() == {"id", "type", "role", "model", "content", "stop_reason", "stop_sequence", "usage"}
    assert (usage.prompt_tokens, usage.completion_tokens) == (18, 3)


def test_a_whole_response_is_told() -> None:
    """With the client's own metadata and format, and nothing of the engine's insides."""
    inner = {
        **speech_of(RESPONSES, {"model": NAME}).whole("hi", 9, 3),
        "text": {"format": {"name": "tool_calling_response"}},
        "input_messages": ["secret"],
        "metadata": None,
    }
    checked = asked(RESPONSES, metadata={"a": "b"}, user="u")
    body, usage = MEMORY[RESPONSES].whole(NAME, checked, json.dumps(inner).encode())
    told = json.loads(body)
    assert (told["model"], told["metadata"], told["user"], told["store"]) == ('my "bot"', {"a": "b"}, "u", False)
    assert told["text"] is None
    assert not told.keys() & {"input_messages", "output_messages", "kv_transfer_params", "ec_transfer_params"}
    assert (usage.prompt_tokens, usage.completion_tokens) == (9, 3)


@pytest.mark.parametrize(
    ("path", "inner", "told"),
    [
        ("/v1/tokenize", {"count": 3, "max_model_len": 8, "tokens": [1]}, {"count": 3, "max_model_len": 8}),
        ("/v1/messages/count_tokens", {"input_tokens": 3, "context_management": {}}, {"input_tokens": 3}),
        (
            "/v1/responses/input_tokens",
            {"count": 3, "max_model_len": 8, "tokens": [1]},
            {"object": "response.input_tokens", "input_tokens": 3},
        ),
    ],
)
def test_a_count_is_told(path: str, inner: dict[str, Any], told: dict[str, Any]) -> None:
    """The number, in the API's form; counting uses no tokens."""
    body, usage = MEMORY[path].whole(NAME, asked(path), json.dumps(inner).encode())
    assert json.loads(body) == told
    assert usage == Usage()


def test_the_items_of_a_count_are_the_turns_of_a_chat() -> None:
    """As vLLM makes them of a response's input: calls and the words before them are one turn."""
    items = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
        {"type": "function_call", "call_id": "c2", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "1"},
    ]
    checked = asked("/v1/responses/input_tokens", input=items, instructions="s")
    upstream = json.loads(checked.upstream_body(model="m", cache_salt="s", context_length=8))
    assert [turn["role"] for turn in upstream["messages"]] == ["system", "user", "assistant", "tool"]
    assert [call["id"] for call in upstream["messages"][2]["tool_calls"]] == ["c1", "c2"]
    assert upstream["messages"][2]["content"] == "b"
    assert upstream["add_special_tokens"] is True


@pytest.mark.parametrize("kind", DIALECTS, ids=lambda kind: kind.path)
def test_an_answer_that_cannot_be_read_is_the_replicas_failure(kind: type[Dialect]) -> None:
    """Not the client's."""
    for garbled in (b"", b"{", b"[]", b'{"a":1}'):
        with pytest.raises(ReplicaFailed):
            MEMORY[kind.path].whole(NAME, asked(kind.path), garbled)


ERRORS = [
    (RequestInvalid("bad", param="n"), 400, "invalid_request_error"),
    (KeyInvalid("no"), 401, "authentication_error"),
    (ModelUnknown("x"), 404, "not_found_error"),
    (ReplicaUnavailable("full", retry_after_s=1), 503, "overloaded_error"),
    (ReplicaFailed("broken"), 502, "api_error"),
    (StorageFull("/dev/sda"), 507, "api_error"),
    (ValueError("/opt/secret"), 500, "api_error"),
]


@pytest.mark.parametrize(("error", "status", "kind"), ERRORS)
def test_an_error_is_spelt_as_its_clients_read_it(error: Exception, status: int, kind: str) -> None:
    """One status in all dialects; Anthropic's envelope for its own, OpenAI's for the others."""
    spoken = MEMORY[MESSAGES].error(error, "r1")
    assert spoken.status == status
    told = json.loads(spoken.body)
    assert (told["type"], told["error"]["type"], told["request_id"]) == ("error", kind, "r1")
    assert dict(spoken.headers)[b"content-length"] == b"%d" % len(spoken.body)
    assert (b"retry-after" in dict(spoken.headers)) == (status in (503, 507))
    other = MEMORY[RESPONSES].error(error, "r1")
    assert other.status == status
    assert json.loads(other.body)["error"].keys() == {"message", "type", "param", "code"}
    for body in (spoken.body, other.body):
        assert b"secret" not in body
        assert b"/dev" not in body


def test_a_broken_stream_ends_in_an_error_event() -> None:
    """Named as each API names it, so that no client takes the answer for whole."""
    error = ReplicaFailed("broken")
    assert MEMORY["/v1/chat/completions"].error_event(error, "r").startswith(b'data: {"error":{')
    spoken = MEMORY[MESSAGES].error_event(error, "r")
    assert spoken.startswith(b"event: error\ndata: ")
    assert data_of(spoken)[0]["error"] == {"type": "api_error", "message": "broken"}
    responded = MEMORY[RESPONSES].error_event(error, "r")
    assert responded.startswith(b"event: error\ndata: ")
    assert data_of(responded)[0]["code"] == "engine_error"
    assert data_of(responded)[0]["error"]["message"] == "broken"


def test_a_tool_input_that_was_cut_is_told() -> None:
    """vLLM answers with its JSON parser's complaint, not with what there is."""
    inner = b'{"type":"error","error":{"message":"Expecting value: line 1 column 21 (char 20)"}}'
    error = MEMORY[MESSAGES].refusal(400, inner, asked(MESSAGES))
    assert error.param == "max_tokens"
    assert "column" not in str(error)


@pytest.mark.parametrize(
    ("path", "sent", "told", "text", "param", "reason"),
    [
        (CHAT, {"logit_bias": {"7": 1}}, "logit_bias", "out-of-vocab token ids", "logit_bias", "vocabulary"),
        (
            RESPONSES,
            {"stop_token_ids": [7]},
            "stop_token_ids",
            "out-of-vocab token ids",
            "stop_token_ids",
            "vocabulary",
        ),
        (CHAT, {"tools": TOOLS, "tool_choice": "required"}, "tool_choice.function", "x", "tool_choice", "tool_choice"),
        (CHAT, {"max_completion_tokens": 9}, "max_tokens", "x", "max_completion_tokens", "max_completion_tokens"),
        (RESPONSES, {"max_output_tokens": 9}, "max_completion_tokens", "x", "max_output_tokens", "max_output_tokens"),
        (CHAT, {"n": 2, "temperature": 0}, None, "n must be 1 when using greedy sampling, got 2.", "n", "temperature"),
        (COMPLETIONS, {"prompt": [9]}, None, "Token id 9 is out of vocabulary", "prompt", "vocabulary"),
        (CHAT, {}, "logit_bias", "x", None, "cannot do"),
        (CHAT, {}, "max_tokens", "x", None, "cannot do"),
        (CHAT, {"user": "u"}, "cache_salt", "x", None, "cannot do"),
        (CHAT, {}, "/opt/vllm", "x", None, "cannot do"),
        (CHAT, {}, None, "Token id 9 is out of vocabulary", None, "cannot do"),
    ],
)
def test_a_refusal_names_the_field_that_the_engine_names(
    path: str, sent: dict[str, Any], told: str | None, text: str, param: str | None, reason: str
) -> None:
    """As the client calls it, and only one that the client sent; the engine's sentence stays inside."""
    body = json.dumps({"error": {"message": f"{text} (value=/opt/a-1)", "type": "x", "param": told, "code": 400}})
    error = MEMORY[path].refusal(400, body.encode(), asked(path, **sent))
    assert isinstance(error, RequestInvalid)
    assert error.param == param
    assert reason in str(error)
    assert "/opt" not in str(error)


@pytest.mark.parametrize("kind", DIALECTS, ids=lambda kind: kind.path)
@pytest.mark.parametrize(
    ("status", "body", "expected"),
    [
        (400, b'{"error":{"message":"This model\'s maximum context length is 5"}}', ContextLengthExceeded),
        (400, b'{"type":"error","error":{"message":"exceeds the max_model_len 5 /opt"}}', ContextLengthExceeded),
        (400, b'{"error":{"message":"something in /opt/vllm"}}', RequestInvalid),
        (400, b"not json", RequestInvalid),
        (500, b'{"error":{"message":"CUDA"}}', ReplicaFailed),
        (404, b'{"error":{"message":"Valid aliases: a-1"}}', ReplicaFailed),
    ],
)
def test_a_refusal_is_told_in_our_words(
    kind: type[Dialect], status: int, body: bytes, expected: type[GatewayError]
) -> None:
    """Each class of the engine's refusals has one of ours; none quotes the engine."""
    error = MEMORY[kind.path].refusal(status, body, asked(kind.path))
    assert type(error) is expected
    for inner in ("/opt", "CUDA", "a-1"):
        assert inner not in str(error)
    if expected is ContextLengthExceeded:
        assert error.param == kind.prompt_param
