"""How vLLM words an answer on each of its paths, and how it streams one; the fake replica speaks so.

Checked with vLLM 0.32: `/v1/messages` and `/v1/responses` stream named events, and no `[DONE]`.
"""

import json
from collections.abc import Iterator
from typing import Any

COUNTING = ("/tokenize", "/v1/messages/count_tokens")


class Speech:
    """Chat and plain completions."""

    def __init__(self, path: str, body: dict[str, Any]) -> None:
        self.model: str = body["model"]
        self._chat = path == "/v1/chat/completions"
        self._continuous = bool((body.get("stream_options") or {}).get("continuous_usage_stats"))
        self.cached: int | None = None
        """Tokens of the prompt that were there already; told where there is a number."""

    def whole(self, text: str, prompt: int, completion: int) -> dict[str, Any]:
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "finish_reason": "stop"}
        kind = "chat.completion" if self._chat else "text_completion"
        answer = {"id": "x", "object": kind, "created": 1, "model": self.model}
        return {**answer, "choices": [choice], "usage": self._used(prompt, completion)}

    def opening(self) -> Iterator[bytes]:
        """At once, before the engine has given anything."""
        yield from ()

    def begin(self, prompt: int) -> Iterator[bytes]:
        """Together with the first token."""
        yield from ()

    def token(self, text: str, prompt: int, completion: int) -> bytes:
        """What is said of one; b"": nothing."""
        return self._event([self._choice(text, None)], prompt, completion)

    def end(self, text: str, prompt: int, completion: int) -> Iterator[bytes]:
        """After the last token."""
        yield self._event([self._choice("", "stop")], prompt, completion)
        yield self._event([], prompt, completion, counts=True)
        yield b"data: [DONE]\n\n"

    def _choice(self, text: str, reason: str | None) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": {"content": text} if text else {}} if self._chat else {"text": text}
        return {"index": 0, **said, "finish_reason": reason}

    def _event(self, choices: list[dict[str, Any]], prompt: int, completion: int, *, counts: bool = False) -> bytes:
        """`usage` comes after `choices`."""
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        event = {"id": "x", "object": kind, "created": 1, "model": self.model, "choices": choices}
        if counts or self._continuous:
            event["usage"] = self._used(prompt, completion)
        return b"data: " + _json(event) + b"\n\n"

    def _used(self, prompt: int, completion: int) -> dict[str, Any]:
        details = {} if self.cached is None else {"prompt_tokens_details": {"cached_tokens": self.cached}}
        return {**usage(prompt, completion), **details}


class MessagesSpeech(Speech):
    """Anthropic's."""

    def whole(self, text: str, prompt: int, completion: int) -> dict[str, Any]:
        return self._message([{"type": "text", "text": text}], "end_turn", prompt, completion)

    def begin(self, prompt: int) -> Iterator[bytes]:
        yield named("message_start", message=self._message([], None, prompt, 0))
        yield named("content_block_start", index=0, content_block={"type": "text", "text": ""})

    def token(self, text: str, prompt: int, completion: int) -> bytes:
        return named("content_block_delta", index=0, delta={"type": "text_delta", "text": text}) if text else b""

    def end(self, text: str, prompt: int, completion: int) -> Iterator[bytes]:
        yield named("content_block_stop", index=0)
        told = {"input_tokens": prompt, "output_tokens": completion}
        yield named("message_delta", delta={"stop_reason": "end_turn", "stop_sequence": None}, usage=told)
        yield named("message_stop")

    def _message(
        self, content: list[dict[str, Any]], reason: str | None, prompt: int, completion: int
    ) -> dict[str, Any]:
        told = {"input_tokens": prompt, "output_tokens": completion}
        head = {"id": "chatcmpl-x", "type": "message", "role": "assistant", "model": self.model}
        return {**head, "content": content, "stop_reason": reason, "stop_sequence": None, "usage": told}


class ResponsesSpeech(Speech):
    """OpenAI's Responses API."""

    def whole(self, text: str, prompt: int, completion: int) -> dict[str, Any]:
        return self._response("completed", [self._item(text, "completed")], self._usage(prompt, completion))

    def opening(self) -> Iterator[bytes]:
        yield named("response.created", response=self._response("in_progress", [], None), sequence_number=0)
        yield named("response.in_progress", response=self._response("in_progress", [], None), sequence_number=1)

    def begin(self, prompt: int) -> Iterator[bytes]:
        yield named("response.output_item.added", output_index=0, item=self._item("", "in_progress"))
        yield named("response.content_part.added", item_id="i", output_index=0, content_index=0, part=_part(""))

    def token(self, text: str, prompt: int, completion: int) -> bytes:
        place = {"item_id": "i", "output_index": 0, "content_index": 0}
        return named("response.output_text.delta", **place, delta=text, logprobs=[]) if text else b""

    def end(self, text: str, prompt: int, completion: int) -> Iterator[bytes]:
        place = {"item_id": "i", "output_index": 0, "content_index": 0}
        yield named("response.output_text.done", **place, text=text, logprobs=[])
        yield named("response.content_part.done", **place, part=_part(text))
        yield named("response.output_item.done", output_index=0, item=self._item(text, "completed"))
        yield named("response.completed", response=self.whole(text, prompt, completion))

    def _item(self, text: str, status: str) -> dict[str, Any]:
        return {"id": "i", "type": "message", "role": "assistant", "status": status, "content": [_part(text)]}

    @staticmethod
    def _usage(prompt: int, completion: int) -> dict[str, Any]:
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + completion,
        }

    def _response(self, status: str, output: list[dict[str, Any]], told: dict[str, Any] | None) -> dict[str, Any]:
        return {
            "id": "resp_x",
            "object": "response",
            "created_at": 1,
            "status": status,
            "model": self.model,
            "output": output,
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "usage": told,
            "kv_transfer_params": {"inner": "/secret/path"},
        }


SPEECHES = {"/v1/messages": MessagesSpeech, "/v1/responses": ResponsesSpeech}


def speech_of(path: str, body: dict[str, Any]) -> Speech:
    """The words of one answer: a call where tools are given."""
    from loadtests.fake.calls import ChatCall, MessagesCall, ResponsesCall, asks_for_call

    if asks_for_call(body):
        return {"/v1/messages": MessagesCall, "/v1/responses": ResponsesCall}.get(path, ChatCall)(path, body)
    return SPEECHES.get(path, Speech)(path, body)


def counted(path: str, tokens: int, max_model_len: int) -> dict[str, Any]:
    """The answer of a path that only counts."""
    if path == "/tokenize":
        return {"count": tokens, "max_model_len": max_model_len, "tokens": list(range(tokens)), "token_strs": None}
    return {"input_tokens": tokens, "context_management": None}


def usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def named(name: str, /, **members: object) -> bytes:
    return f"event: {name}\n".encode() + b"data: " + _json({"type": name, **members}) + b"\n\n"


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": None}


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
