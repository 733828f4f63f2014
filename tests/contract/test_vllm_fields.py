"""Our classes of request fields against the request classes of the vLLM that is installed."""

import json
import subprocess
import sys
from typing import Any

import pytest
from msgspec.structs import fields

from gateway.dialects import DIALECTS, OPT_IN, Bounds, Dialect, all_dialects
from gateway.dialects.chat import IGNORED as CHAT_IGNORED
from gateway.dialects.counts import AskedTokens
from gateway.dialects.fields import GATEWAY_SET
from gateway.dialects.responses import IGNORED as RESPONSES_IGNORED

# in a process of its own: importing vLLM warns of many things that are not ours to mend
PROGRAM = """
import json
import sys
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest
kinds = {
    "/v1/chat/completions": [ChatCompletionRequest],
    "/v1/completions": [CompletionRequest],
    "/v1/responses": [ResponsesRequest],
    "/v1/messages": [AnthropicMessagesRequest],
    "/v1/messages/count_tokens": [AnthropicCountTokensRequest],
    "/v1/responses/input_tokens": [TokenizeChatRequest],
    "/v1/tokenize": [TokenizeChatRequest, TokenizeCompletionRequest],
}
fields = {path: sorted({name for kind in of for name in kind.model_fields}) for path, of in kinds.items()}
scored = [
    kinds[path][0](**body).to_sampling_params(4, {}).prompt_logprobs is not None
    for path, body in json.loads(sys.argv[1])
]
print(json.dumps([fields, scored]))
"""
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
PLAIN = {"model": "m", "prompt": "x"}
ECHOES: tuple[dict[str, Any], ...] = (
    {},
    {"echo": False},
    {"echo": True},
    {"prompt_logprobs": 0},
    {"prompt_logprobs": 2},
)
SCORING: list[tuple[str, dict[str, Any]]] = [
    *(("/v1/chat/completions", {**CHAT, **asked, **more}) for asked in ({}, {"logprobs": True}) for more in ECHOES),
    *(("/v1/completions", {**PLAIN, **asked, **more}) for asked in ({}, {"logprobs": 0}) for more in ECHOES),
]
"""Requests, some of which ask for logprobs of their prompt."""
NOT_SENT = {
    "/v1/chat/completions": {*CHAT_IGNORED, "max_completion_tokens"},
    "/v1/completions": set(CHAT_IGNORED),
    "/v1/responses": {*RESPONSES_IGNORED} - {"store"},
    "/v1/messages": {"cache_control", "inference_geo", "metadata", "service_tier"},
    "/v1/messages/count_tokens": {"cache_control"},
}
"""What clients may send, and the engine does not see."""


@pytest.fixture(scope="module")
def told() -> Any:
    command = [sys.executable, "-c", PROGRAM, json.dumps(SCORING)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def vllm_fields(told: Any) -> dict[str, set[str]]:
    return {path: set(found) for path, found in told[0].items()}


def accepted(kind: type[Dialect]) -> set[str]:
    return {field.name for field in fields(kind.request)} - GATEWAY_SET


@pytest.mark.parametrize("kind", DIALECTS, ids=lambda kind: kind.path)
def test_every_field_of_the_engine_is_in_exactly_one_class(
    kind: type[Dialect], vllm_fields: dict[str, set[str]]
) -> None:
    """Taken within bounds, the operator's to allow, the gateway's, or refused with a reason: a new one fails here."""
    if kind.path == "/v1/responses/input_tokens":
        return  # its request is made into one of tokenize's, whose fields stand below
    taken = accepted(kind) - (kind.opt_in & accepted(kind))
    for name in vllm_fields[kind.path]:
        classes = [name in taken, name in kind.opt_in, name in GATEWAY_SET, name in kind.refused and name not in taken]
        assert classes.count(True) == 1, name


@pytest.mark.parametrize("kind", DIALECTS, ids=lambda kind: kind.path)
def test_nothing_is_passed_that_the_engine_does_not_know(kind: type[Dialect], vllm_fields: dict[str, set[str]]) -> None:
    """vLLM takes unknown fields in silence: one of ours that it lost would do nothing."""
    sent = accepted(kind) - NOT_SENT.get(kind.path, set())
    if kind.path == "/v1/responses/input_tokens":
        sent = {field.name for field in fields(AskedTokens)}
    assert sent <= vllm_fields[kind.path]
    assert kind.opt_in <= vllm_fields[kind.path]


def test_every_opt_in_field_belongs_to_a_dialect() -> None:
    """What `TAILOR_ALLOWED_FIELDS` may name does something somewhere."""
    assert set().union(*(kind.opt_in for kind in DIALECTS)) == set(OPT_IN)


def test_it_is_known_which_requests_ask_for_logprobs_of_the_prompt(told: Any) -> None:
    """Each of them, and no other: they must not come to an engine on a CPU."""
    dialects = all_dialects(Bounds(allowed_fields=frozenset(OPT_IN)))
    found = [bool(dialects[path].check(json.dumps(body).encode()).scores_prompt) for path, body in SCORING]
    assert found == told[1]
    assert set(found) == {True, False}
