"""What a planned row is as an HTTP request."""

import json
from typing import Any

from loadtests.bodies import CANARY_PROMPT, WORDS, Bodies, Planned, Text
from loadtests.recording import ABSENT
from loadtests.scenario import Workload

PLANNED = Planned(0, ABSENT, 0, 0, 0, 0, 32, 16, ABSENT, 0, ABSENT, ABSENT, False, 7)


def bodies(*workloads: dict[str, Any], tokens_per_word: float = 1.0) -> Bodies:
    return Bodies(
        workloads=[Workload.model_validate(one) for one in workloads or ({},)],
        models=['say "hi" %s', "b"],
        keys=["sk-0", "sk-1"],
        base_model="base",
        host="tailor:1",
        tokens_per_word=tokens_per_word,
    )


def read(request: bytes) -> tuple[str, dict[str, Any]]:
    """Head, and the body as the length in it says."""
    head, _, body = request.partition(b"\r\n\r\n")
    assert f"content-length: {len(body)}" in head.decode()
    told: dict[str, Any] = json.loads(body)
    return head.decode(), told


def prompt(request: bytes) -> str:
    text: str = read(request)[1]["messages"][0]["content"]
    return text


def test_a_request_has_the_key_the_model_and_the_lengths_of_its_row() -> None:
    """However odd the model's name is."""
    head, body = read(bodies().request(PLANNED))
    assert head.startswith("POST /v1/chat/completions HTTP/1.1\r\nhost: tailor:1\r\nauthorization: Bearer sk-0\r\n")
    assert (body["model"], body["max_tokens"], body["min_tokens"]) == ('say "hi" %s', 16, 16)
    assert body["stream_options"] == {"include_usage": True}
    assert len(body["messages"][0]["content"].split()) == 32
    _, base = read(bodies({"route": "completions", "stream": False}).request(PLANNED._replace(model=ABSENT)))
    assert (base["model"], len(base["prompt"].split()), "stream" in base) == ("base", 32, False)


def test_another_seed_gives_other_words_from_the_start_and_a_shorter_prompt_is_the_begin_of_a_longer() -> None:
    """So no prefix is cached by accident, and the turns of a conversation share theirs."""
    make = bodies()
    short, long, other = (
        prompt(make.request(PLANNED._replace(seed=seed, prompt_tokens=count)))
        for seed, count in ((7, 20), (7, 300_000), (8, 20))
    )
    assert long.startswith(short)
    assert len(long.split()) == 300_000
    assert other.split()[0] != short.split()[0]


def test_the_prompts_of_a_tenant_share_their_begin() -> None:
    """As long as the workload says; those of another tenant have another."""
    make = bodies({"shared_prefix_tokens": 20})
    first, second, other = (
        prompt(make.request(PLANNED._replace(tenant=tenant, seed=seed))).split()
        for tenant, seed in ((0, 1), (0, 2), (1, 1))
    )
    assert first[:20] == second[:20] != other[:20]
    assert first[20] != second[20]
    assert len(first) == 32


def test_parameters_are_those_of_the_row_and_a_canary_has_none() -> None:
    """Its answer is to be the same each time."""
    make = bodies({"parameters": [{"share": 0.5, "fields": {"temperature": 0.3, "stop": ["100%"]}}]})
    _, plain = read(make.request(PLANNED))
    _, mixed = read(make.request(PLANNED._replace(parameters=0)))
    _, canary = read(make.request(PLANNED._replace(parameters=0, canary=True)))
    assert "temperature" not in plain
    assert (mixed["temperature"], mixed["stop"]) == (0.3, ["100%"])
    assert (canary["temperature"], canary["messages"][0]["content"]) == (0, CANARY_PROMPT)
    assert canary["model"] == 'say "hi" %s'


def test_a_word_of_more_tokens_makes_prompts_of_fewer_words() -> None:
    """What was asked for are tokens."""
    assert len(prompt(bodies(tokens_per_word=4.0).request(PLANNED)).split()) == 8


def test_a_changed_key_is_in_the_next_request() -> None:
    """Of that tenant alone."""
    make = bodies()
    make.request(PLANNED)
    make.change_key(0, "sk-new")
    heads = [read(make.request(PLANNED._replace(tenant=tenant)))[0] for tenant in (0, 1)]
    assert "Bearer sk-new\r\n" in heads[0]
    assert "Bearer sk-1\r\n" in heads[1]


def test_words_are_different_and_text_goes_on_around_its_end() -> None:
    """Any place and any length."""
    assert len(set(WORDS)) == 64
    text = Text()
    assert text.words(65_530, 10).split() == text.words(65_530, 6).split() + text.words(0, 4).split()
