"""How many tokens a prompt has: three APIs' ways to ask, answered by the engine's tokenizer; nothing is generated.

An adapter changes no tokenizer, so any model name of the engine's does.
"""

from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from gateway.dialects.chat import check_messages, check_tools
from gateway.dialects.chat_shapes import Assistant, CalledFunction, Function, Message, Tool, ToolCall
from gateway.dialects.dialect import ENCODER, MOST_TOOLS, Checked, Dialect
from gateway.dialects.fields import ModelName
from gateway.dialects.message_shapes import Conversation
from gateway.dialects.messages import Spoken
from gateway.dialects.responses import Asked, Conversing, Item
from gateway.dialects.words import Pieces, hold_text
from gateway.errors import ReplicaFailed, RequestInvalid
from gateway.tokens import Usage


class TokenizeRequest(Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """A prompt, or messages (with the tools that a chat would show)."""

    model: ModelName
    prompt: Raw | UnsetType = UNSET
    messages: Annotated[list[Message], Meta(min_length=1)] | None = None
    tools: Annotated[list[Tool], Meta(min_length=1, max_length=MOST_TOOLS)] | None = None


def _counting(request: Any, size: int) -> Checked:
    return Checked(
        model=request.model,
        stream=False,
        request=request,
        length_field="",
        length_param="",
        length=0,
        own_length=False,
        choices=0,
        prompt_bytes=size,
        affinity=None,
    )


class _Count(Struct):
    count: int
    max_model_len: int


class Tokenize(Dialect):
    """`POST /v1/tokenize`: `{"count", "max_model_len"}`; how its text is cut into tokens stays the engine's."""

    path = "/v1/tokenize"
    upstream_path = "/tokenize"
    prompt_param = "messages"
    generates = False
    request = TokenizeRequest
    message = Message
    opt_in: ClassVar = frozenset({"chat_template_kwargs"})
    hints: ClassVar = {".type": "this server reads text and calls functions only"}

    def bound(self, request: Any, size: int, pieces: Pieces) -> Checked:
        if (request.prompt is UNSET) == (request.messages is None):
            raise RequestInvalid("Send prompt or messages, one of them.", param="prompt")
        if request.messages is not None:
            self.hold_number(request.messages)
        if request.tools is not None:
            if request.messages is None:
                raise RequestInvalid("tools go with messages.", param="tools")
            check_tools(request.tools, self.schemas(), None)
        if request.messages is not None:
            check_messages(request.messages, pieces)
            _name_thoughts_alike(request.messages)
        else:
            hold_text(request.prompt, "prompt")
        return _counting(request, size)

    def whole(self, engine_name: str, checked: Checked, body: bytes) -> tuple[bytes, Usage]:
        return ENCODER.encode(counted(body)), Usage()


def _name_thoughts_alike(messages: list[Message]) -> None:
    """`reasoning_content` as `reasoning`: vLLM 0.32 does so for a chat, and leaves it out of a count."""
    for message in messages:
        if isinstance(message, Assistant) and message.reasoning_content is not UNSET:
            if message.reasoning is UNSET:
                message.reasoning = message.reasoning_content
            message.reasoning_content = UNSET


def counted(body: bytes) -> _Count:
    """What vLLM's tokenize answers, without the tokens.

    Raises:
        ReplicaFailed: it is not that.
    """
    try:
        return msgspec.json.decode(body, type=_Count)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ReplicaFailed("The engine's answer cannot be read; try again.") from error


class _InputTokens(Struct):
    input_tokens: int


class CountTokens(Spoken):
    """`POST /v1/messages/count_tokens`."""

    path = "/v1/messages/count_tokens"
    upstream_path = "/v1/messages/count_tokens"
    generates = False
    request = Conversation
    opt_in: ClassVar = frozenset({"chat_template_kwargs", "thinking"})

    def bound(self, request: Any, size: int, pieces: Pieces) -> Checked:
        self.conversation(request, pieces)
        return _counting(request, size)

    def whole(self, engine_name: str, checked: Checked, body: bytes) -> tuple[bytes, Usage]:
        try:
            return ENCODER.encode(msgspec.json.decode(body, type=_InputTokens)), Usage()
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ReplicaFailed("The engine's answer cannot be read; try again.") from error


class InputTokensRequest(Asked, kw_only=True):
    reasoning: None = None


class Turn(Struct, omit_defaults=True):
    """A chat message as vLLM itself makes it of the input's items."""

    role: str
    content: Raw | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET
    tool_call_id: str | UnsetType = UNSET


class AskedTokens(Struct, omit_defaults=True):
    model: str
    messages: list[Turn]
    add_special_tokens: bool  # as vLLM 0.32 does for responses, and not for chats: a template's BOS comes twice
    tools: list[Tool] | None = None


class InputTokens(Conversing):
    """`POST /v1/responses/input_tokens`, which vLLM has not: the same prompt, asked of its tokenize."""

    path = "/v1/responses/input_tokens"
    upstream_path = "/tokenize"
    generates = False
    request = InputTokensRequest

    def bound(self, request: Any, size: int, pieces: Pieces) -> Checked:
        self.asked(request)
        tools = [Tool(Function(one.name, one.description, one.parameters, one.strict)) for one in request.tools or ()]
        return _counting(
            AskedTokens(request.model, _turns(request, self.items(request.input, pieces)), True, tools or None), size
        )

    def whole(self, engine_name: str, checked: Checked, body: bytes) -> tuple[bytes, Usage]:
        told = {"object": "response.input_tokens", "input_tokens": counted(body).count}
        return ENCODER.encode(told), Usage()


def _turns(request: Asked, items: list[Item]) -> list[Turn]:
    """The chat that vLLM makes of instructions and input: a model's text and calls in a row are one turn."""
    turns: list[Turn] = []
    if isinstance(request.instructions, Raw) and len(request.instructions) > len('""'):
        turns.append(Turn("system", request.instructions))
    if not items:
        turns.append(Turn("user", request.input))
    for item in items:
        if item.type == "function_call_output":
            turns.append(Turn("tool", item.output, tool_call_id=item.call_id or ""))
            continue
        answering = turns[-1] if turns and turns[-1].role == "assistant" else None
        if item.type == "function_call":
            if answering is None:
                answering = Turn("assistant", tool_calls=[])
                turns.append(answering)
            calls = answering.tool_calls if isinstance(answering.tool_calls, list) else []
            answering.tool_calls = [*calls, _call(item)]
        elif item.role == "assistant" and answering is not None and answering.content is UNSET:
            answering.content = item.content
        else:
            turns.append(Turn(item.role or "user", item.content))
    return turns


def _call(item: Item) -> ToolCall:
    arguments = item.arguments if isinstance(item.arguments, Raw) else Raw(b'""')
    return ToolCall(item.call_id or "", CalledFunction(item.name or "", arguments))
