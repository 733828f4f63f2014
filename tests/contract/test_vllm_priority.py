"""How the vLLM that is installed is told which of its waiting requests goes first."""

import json
import subprocess
import sys

from loadtests.fake.replica import PRIORITY_HEADER

# in a process of its own: importing vLLM warns of many things that are not ours to mend
PROGRAM = """
import inspect, json, sys
from types import SimpleNamespace
from starlette.requests import Request
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

def told(kind, *values):
    headers = [(sys.argv[1].encode(), value) for value in values]
    request = Request({"type": "http", "headers": headers})
    return kind._get_priority(SimpleNamespace(priority=5), request)

READS = "priority=self._get_priority(request, raw_request)"
asked = {kind.__name__: [told(kind, b"-7"), told(kind, b"x"), told(kind)] for kind in (
    OpenAIServingChat, OpenAIServingCompletion, OpenAIServingResponses, AnthropicServingMessages)}
sends = {kind.__name__: READS in inspect.getsource(kind) for kind in (
    OpenAIServingChat, OpenAIServingCompletion, OpenAIServingResponses)}
sends["AnthropicServingMessages"] = (
    issubclass(AnthropicServingMessages, OpenAIServingChat)
    and "await self.create_chat_completion(chat_req, raw_request)" in inspect.getsource(AnthropicServingMessages))
print(json.dumps([asked, sends]))
"""


def test_the_header_goes_before_the_bodys_priority_on_every_path() -> None:
    """It is the one that the gateway sends and the fake replica reads; what is no number counts for nothing."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, PRIORITY_HEADER], capture_output=True, text=True, check=True)
    asked, sends = json.loads(done.stdout.splitlines()[-1])
    assert len(asked) == 4
    for kind, told in asked.items():
        assert told == [-7, 5, 5], kind
    assert all(sends.values()), sends
