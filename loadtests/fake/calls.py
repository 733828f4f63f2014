"""How vLLM words a call of a function on each of its paths; the fake replica answers so where it is given tools.

The function called is the first one, its argument `text` what the answer would have said. Shapes recorded from vLLM
0.32.
"""

import json
from collections.abc import Iterator
from typing import Any

from loadtests.fake.speech import MessagesSpeech, ResponsesSpeech, Speech, named, usage

OPEN, CLOSE = '{"text":"', '"}'


def asks_for_call(body: dict[str, Any]) -> bool:
    """Tools, and no tool's result yet."""
    choice = body.get("tool_choice")
    return bool(body.get("tools")) and choice not in ("none", {"type": "none"}) and '"call_1"' not in json.dumps(body)


def _arguments(text: str) -> str:
    return OPEN + text + CLOSE


class ChatCall(Speech):
    def __init__(self, path: str, body: dict[str, Any]) -> None:
        super().__init__(path, body)
        self._name = body["tools"][0]["function"]["name"]

    def whole(self, text: str, prompt: int, completion: int) -> dict[str, Any]:
        call = {"id": "call_1", "type": "function", "function": {"name": self._name, "arguments": _arguments(text)}}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": None, "tool_calls": [call]},
            "finish_reason": "tool_calls",
        }
        answer = {"id": "x", "object": "chat.completion", "created": 1, "model": self.model}
        return {**answer, "choices": [choice], "usage": usage(prompt, completion)}

    def begin(self, prompt: int) -> Iterator[bytes]:
        yield self._event(
            [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}], prompt, 0
        )
        call = {"id": "call_1", "type": "function", "index": 0, "function": {"name": self._name, "arguments": OPEN}}
        yield self._event([{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}], prompt, 0)

    def token(self, text: str, prompt: int, completion: int) -> bytes:
        call = {"index": 0, "function": {"arguments": text}}
        return self._event([{"index": 0, "delta": {"tool_calls": [call]}, "finish_reason": None}], prompt, completion)

    def end(self, text: str, prompt: int, completion: int) -> Iterator[bytes]:
        yield self.token(CLOSE, prompt, completion)
        yield self._event([{"index": 0, "delta": {}, "finish_reason": "tool_calls"}], prompt, completion)
        yield self._event([], prompt, completion, counts=True)
        yield b"data: [DONE]\n\n"


class MessagesCall(MessagesSpeech):
    def __init__(self, path: str, body: dict[str, Any]) -> None:
        super().__init__(path, body)
        self._name = body["tools"][0]["name"]

    def whole(self, text: str, prompt: int, completion: int) -> dict[str, Any]:
        used = {"type": "tool_use", "id": "call_1", "name": self._name, "input": {"text": text}}
        return self._message([used], "tool_use", prompt, completion)

    def begin(self, prompt: int) -> Iterator[bytes]:
        yield named("message_start", message=self._message([], None, prompt, 0))
        block = {"type": "tool_use", "id": "call_1", "name": self._name, "input": {}}
        yield named("content_block_start", content_block=block, index=0)
        yield self.token(OPEN, prompt, 0)

    def token(self, text: str, prompt: int, completion: int) -> bytes:
        return named("content_block_delta", delta={"type": "input_json_delta", "partial_json": text}, index=0)

    def end(self, text: str, prompt: int, completion: int) -> Iterator[bytes]:
        yield self.token(CLOSE, prompt, completion)
        yield named("content_block_stop", index=0)
        told = {"input_tokens": prompt, "output_tokens": completion}
        yield named("message_delta", delta={"stop_reason": "tool_use", "stop_sequence": None}, usage=told)
        yield named("message_stop")


class ResponsesCall(ResponsesSpeech):
    def __init__(self, path: str, body: dict[str, Any]) -> None:
        super().__init__(path, body)
        self._name = body["tools"][0]["name"]

    def whole(self, text: str, prompt: int, completion: int) -> dict[str, Any]:
        called = {**self._called(_arguments(text)), "async_": None}
        del called["async"]  # no stream spells it so
        return self._response("completed", [called], self._usage(prompt, completion))

    def begin(self, prompt: int) -> Iterator[bytes]:
        item = {**self._called(""), "status": "in_progress"}
        yield named("response.output_item.added", item=item, output_index=0, sequence_number=2)
        yield self.token(OPEN, prompt, 0)

    def token(self, text: str, prompt: int, completion: int) -> bytes:
        place = {"item_id": "fc_1", "output_index": 0, "sequence_number": 3}
        return named("response.function_call_arguments.delta", delta=text, **place)

    def end(self, text: str, prompt: int, completion: int) -> Iterator[bytes]:
        yield self.token(CLOSE, prompt, completion)
        said = _arguments(text + "." * (completion - 1))
        place = {"item_id": "fc_1", "output_index": 0, "sequence_number": 4}
        yield named("response.function_call_arguments.done", arguments=said, name=self._name, **place)
        yield named("response.output_item.done", item=self._called(said), output_index=0, sequence_number=5)
        told = self._response("completed", [self._called(said)], self._usage(prompt, completion))
        yield named("response.completed", response=told, sequence_number=6)

    def _called(self, arguments: str) -> dict[str, Any]:
        head = {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": self._name, "status": "completed"}
        return {**head, "arguments": arguments, "async": None, "caller": None, "namespace": None}
