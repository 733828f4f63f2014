"""Our lists of request fields against the request classes of the vLLM that is installed."""

import json
import subprocess
import sys

import msgspec
import pytest

from gateway.request_policy import GATEWAY_SET, IGNORED, REFUSED, ChatRequest, CompletionRequest

# in a process of its own: importing vLLM warns of many things that are not ours to mend
PROGRAM = """
import json
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
print(json.dumps({kind.__name__: list(kind.model_fields) for kind in (ChatCompletionRequest, CompletionRequest)}))
"""
PAIRS = [(ChatRequest, "ChatCompletionRequest"), (CompletionRequest, "CompletionRequest")]


@pytest.fixture(scope="module")
def vllm_fields() -> dict[str, set[str]]:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    return {kind: set(fields) for kind, fields in json.loads(done.stdout.splitlines()[-1]).items()}


def passed_fields(kind: type[msgspec.Struct]) -> set[str]:
    return {field.name for field in msgspec.structs.fields(kind)} - set(IGNORED)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_every_field_of_the_engine_is_in_exactly_one_class(
    ours: type[msgspec.Struct], theirs: str, vllm_fields: dict[str, set[str]]
) -> None:
    """Passed, set by the gateway, or refused with a reason: a field that a new vLLM brings fails here."""
    passed = passed_fields(ours) - GATEWAY_SET
    for name in vllm_fields[theirs] - set(IGNORED):
        classes = [name in passed, name in GATEWAY_SET, name in REFUSED and name not in passed]
        assert classes.count(True) == 1, name


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_nothing_is_passed_that_the_engine_does_not_know(
    ours: type[msgspec.Struct], theirs: str, vllm_fields: dict[str, set[str]]
) -> None:
    """vLLM takes unknown fields in silence: one of ours that it lost would do nothing."""
    assert passed_fields(ours) <= vllm_fields[theirs]
