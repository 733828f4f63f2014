"""A stream's way to the client, however it is cut."""

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.dialects import Bounds
from gateway.dialects.chat import Chat
from gateway.errors import ContextLengthExceeded, ReplicaFailed, RequestInvalid
from gateway.relay import BrokenOff, StreamTranslation, Translation

NAME = "a-0123456789abcdef"
HOSTILE = f'","model":"{NAME}","usage":{{"prompt_tokens":9}} data: {{"error":1}}\n\ndata: [DONE]\n\n'


def event(content: str, **more: object) -> bytes:
    chunk = {"model": NAME, "choices": [{"index": 0, "delta": {"content": content}}], **more}
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n".encode()


USAGE = f'data: {{"model":"{NAME}","choices":[],"usage":{{"prompt_tokens":3,"completion_tokens":2}}}}\n\n'.encode()
STREAM = event("one") + event(HOSTILE) + event("three") + USAGE + b"data: [DONE]\n\n"


def relayed(pieces: list[bytes], *, wants_usage: bool = False) -> tuple[bytes, StreamTranslation]:
    translation = StreamTranslation(NAME, 'my "bot"', wants_usage=wants_usage)
    return b"".join(translation.feed(piece) for piece in pieces), translation


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_a_stream_is_the_same_however_it_is_cut(cuts: list[int]) -> None:
    """Events may arrive in any pieces; a tenant's own text is never taken for structure."""
    places = [0, *sorted(cuts), len(STREAM)]
    pieces = [STREAM[a:b] for a, b in pairwise(places)]
    out, translation = relayed(pieces)
    events = out.split(b"\n\n")[:-1]
    assert [json.loads(e[6:])["choices"][0]["delta"]["content"] for e in events[:-1]] == ["one", HOSTILE, "three"]
    assert {json.loads(e[6:])["model"] for e in events[:-1]} == {'my "bot"'}
    assert events[-1] == b"data: [DONE]"
    assert translation.finished
    assert translation.usage is not None
    assert translation.usage.prompt_tokens == 3


def test_usage_is_shown_when_asked_for() -> None:
    """And only then."""
    assert b'"usage"' in relayed([STREAM], wants_usage=True)[0].replace(HOSTILE.encode(), b"")
    assert b'"prompt_tokens":3' not in relayed([STREAM])[0]


def test_half_an_event_is_never_passed_on() -> None:
    """What comes before a break is whole events."""
    translation = StreamTranslation(NAME, "bot", wants_usage=False)
    assert translation.feed(event("one") + b'data: {"mod').endswith(b"\n\n")
    assert not translation.finished


def test_an_error_of_the_engine_stays_inside() -> None:
    """Its text is replaced by ours."""
    with pytest.raises(ReplicaFailed) as error:
        relayed([event("one"), b'data: {"error":{"message":"/opt/secret"}}\n\n'])
    assert "secret" not in str(error.value)


def test_what_came_with_an_error_and_before_it_is_passed_on() -> None:
    """Though both stood in one piece."""
    with pytest.raises(BrokenOff) as error:
        relayed([event("one") + event("two") + b'data: {"error":{"message":"/opt/secret"}}\n\n' + event("three")])
    assert error.value.passed == relayed([event("one") + event("two")])[0]
    assert "secret" not in str(error.value)


def test_an_endless_event_is_cut_off() -> None:
    """A replica that never ends an event cannot fill our memory."""
    with pytest.raises(ReplicaFailed):
        relayed([b"x" * 65_536] * 600)


def test_all_that_came_while_nobody_read_is_one_event() -> None:
    """vLLM makes one event of it, with the alternatives of each token: 10 MB at most, which come in pieces."""
    long = event("x", logprobs={"content": ["token"] * (10_000_000 // 8)})
    stream = event("one") + long + event("three") + b"data: [DONE]\n\n"
    out, translation = relayed([stream[begin : begin + 65_536] for begin in range(0, len(stream), 65_536)])
    assert len(long) > 9_000_000
    assert out == stream.replace(NAME.encode(), b'my \\"bot\\"')
    assert translation.finished


def test_a_whole_answer_names_the_tenants_model() -> None:
    """Only the answer's own member is replaced, not a look-alike in its text."""
    body = json.dumps(
        {"model": NAME, "choices": [{"message": {"content": f'"model":"{NAME}"'}}]}, separators=(",", ":")
    )
    answer = json.loads(Translation(NAME, "bot").whole(body.encode()))
    assert answer["model"] == "bot"
    assert answer["choices"][0]["message"]["content"] == f'"model":"{NAME}"'


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"error":{"message":"This model\'s maximum context length is 5"}}', ContextLengthExceeded),
        (400, b'{"error":{"message":"something in /opt/vllm"}}', RequestInvalid),
        (400, b"not json", RequestInvalid),
        (500, b'{"error":{"message":"CUDA"}}', ReplicaFailed),
        (404, b"", ReplicaFailed),
    ],
)
def test_a_refusal_is_told_in_our_words(status: int, body: bytes, kind: type[Exception]) -> None:
    """Each class of the engine's refusals has one of ours; none quotes the engine."""
    chat = Chat(Bounds())
    error = chat.refusal(status, body, chat.check(b'{"model":"bot","messages":[{"role":"user","content":"x"}]}'))
    assert type(error) is kind
    assert "/opt" not in str(error)
    assert "CUDA" not in str(error)
