"""Our classes of request fields against the request classes of the vLLM that is installed."""

import json
import subprocess
import sys

import pytest
from msgspec.structs import fields

from gateway.dialects import DIALECTS, OPT_IN, Dialect
from gateway.dialects.chat import IGNORED as CHAT_IGNORED
from gateway.dialects.counts import AskedTokens
from gateway.dialects.fields import GATEWAY_SET
from gateway.dialects.responses import IGNORED as RESPONSES_IGNORED

# in a process of its own: importing vLLM warns of many things that are not ours to mend
PROGRAM = """
import json
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
print(json.dumps({path: sorted({name for kind in of for name in kind.model_fields}) for path, of in kinds.items()}))
"""
NOT_SENT = {
    "/v1/chat/completions": {*CHAT_IGNORED, "max_completion_tokens"},
    "/v1/completions": set(CHAT_IGNORED),
    "/v1/responses": {*RESPONSES_IGNORED} - {"store"},
    "/v1/messages": {"cache_control", "inference_geo", "metadata", "service_tier"},
    "/v1/messages/count_tokens": {"cache_control"},
}
"""What clients may send, and the engine does not see."""


@pytest.fixture(scope="module")
def vllm_fields() -> dict[str, set[str]]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    return {path: set(found) for path, found in json.loads(done.stdout.splitlines()[-1]).items()}


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
