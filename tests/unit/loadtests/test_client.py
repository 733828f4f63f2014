"""What becomes of an answer as it is read, without a connection."""

import json

import pytest

from loadtests.client import Exchange
from loadtests.recording import ABSENT, Array, Outcome
from loadtests.records import Records
from loadtests.selection import select
from tests.unit.loadtests.runs import run_of

DONE = b"data: [DONE]\n\n"
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":1}}\n\n'
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
TEXT = b'data: {"choices":[{"delta":{"content":"red"}}]}\n\n'


def _read(body: bytes, *, streams: bool = True) -> Exchange:
    exchange = Exchange(0, b"", lambda _: None, scheduled=0, streams=streams, keeps_answer=True)
    exchange.sent = 0
    exchange.kept[b"content-type"] = b"text/event-stream" if streams else b"application/json"
    exchange.head_came(200, 1_000)
    exchange.body_came(body, 2_000)
    exchange.body_ended(3_000)
    return exchange


@pytest.mark.parametrize(
    ("body", "outcome", "first"),
    [
        (DONE, Outcome.TRUNCATED, ABSENT),
        (ROLE + DONE, Outcome.TRUNCATED, ABSENT),
        (TEXT + DONE, Outcome.WHOLE, 2_000),
        (ROLE + USAGE + DONE, Outcome.WHOLE, ABSENT),
        (TEXT, Outcome.TRUNCATED, 2_000),
    ],
    ids=["only the end", "no text", "text", "a token without text", "no end"],
)
def test_a_stream_that_brought_nothing_is_not_whole(body: bytes, outcome: Outcome, first: int) -> None:
    """However rightly it ended."""
    exchange = _read(body)
    assert (exchange.outcome, exchange.first) == (outcome, first)


def test_a_token_that_is_no_text_yet_has_a_time_of_its_own() -> None:
    """Half a letter: other tools count it as the first token, while a user sees nothing."""
    half = b'data: {"choices":[{"text":""}]}\n\n'
    exchange = Exchange(0, b"", lambda _: None, scheduled=0)
    exchange.sent = 0
    exchange.kept[b"content-type"] = b"text/event-stream"
    exchange.head_came(200, 1_000)
    for at, piece in enumerate((half, half, TEXT, half + DONE), 2):
        exchange.body_came(piece, at * 1_000)
    exchange.body_ended(6_000)
    records = Records()
    records.add(exchange, 0, 0)
    records.add(_read(TEXT + half + DONE), 1, 0)
    rows = records.since_last()[0]
    assert rows["token"].tolist() == [2_000, 2_000]
    assert rows["first"].tolist() == [4_000, 2_000]


@pytest.mark.parametrize(
    ("message", "tokens", "outcome"),
    [("", 0, Outcome.TRUNCATED), ("", 1, Outcome.WHOLE), ("red", 0, Outcome.WHOLE)],
)
def test_a_json_answer_that_brought_nothing_is_not_whole(message: str, tokens: int, outcome: Outcome) -> None:
    """As a stream is not."""
    told = {"choices": [{"message": {"content": message}}], "usage": {"completion_tokens": tokens}}
    assert _read(json.dumps(told).encode(), streams=False).outcome is outcome


def test_an_empty_answer_of_a_canary_is_kept() -> None:
    """Else nobody compared it."""
    records = Records()
    records.add(_read(ROLE + USAGE + DONE), 0, 0)
    rows = records.since_last()[0]
    assert rows["answer"].tolist() == [0]


def test_an_answer_without_text_keeps_no_objective() -> None:
    """It has no time to its first token, and not one before it was sent."""

    def change(_planned: Array, rows: Array) -> None:
        rows["first"][::2] = ABSENT

    chosen = select(run_of(change=change))
    assert chosen.kept.sum() == len(chosen.at) / 2
