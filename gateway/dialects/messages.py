"""`POST /v1/messages`, as Anthropic has it; vLLM serves it through its chat."""

import re
from typing import Any, ClassVar, Final

import msgspec
from msgspec import UNSET, Raw, Struct
from mypy_extensions import mypyc_attr

from gateway.dialects.chat import NO_PARSER
from gateway.dialects.dialect import ENCODER, Checked, Dialect, Stream, read_error
from gateway.dialects.events import NamedEvents
from gateway.dialects.fields import REFUSED
from gateway.dialects.lists import ListDecoder
from gateway.dialects.message_shapes import (
    MOST_BLOCKS,
    Answer,
    Assistant,
    Conversation,
    Delta,
    HiddenThought,
    Message,
    MessagesRequest,
    OutputConfig,
    Start,
    System,
    TextBlock,
    Thought,
    ToldError,
    ToldUsage,
    ToolChoice,
    ToolResult,
    ToolUse,
    User,
)
from gateway.dialects.schemas import SchemaBudget
from gateway.dialects.words import Pieces, hold_null, hold_text, is_null, is_text, not_text
from gateway.errors import ErrorAnswer, GatewayError, ReplicaFailed, RequestInvalid
from gateway.relay import BROKE_OFF
from gateway.tokens import Usage

_BLOCKS: Final = ListDecoder(TextBlock, most=MOST_BLOCKS)
_DECODERS: Final[dict[type[Struct], ListDecoder]] = {
    User: ListDecoder(TextBlock | ToolResult, least=1, most=MOST_BLOCKS),
    Assistant: ListDecoder(TextBlock | ToolUse | Thought | HiddenThought, most=MOST_BLOCKS),
    System: _BLOCKS,
}


@mypyc_attr(allow_interpreted_subclasses=True)
class Spoken(Dialect):
    """What both endpoints of this API share."""

    message = Message
    prompt_param = "messages"
    refused: ClassVar = {
        **REFUSED,
        "effort": "this server's operator has not enabled control of reasoning",
        "defer_loading": "all tools are shown to the model",
        "source": "this server reads text only",
    }
    hints: ClassVar = {
        "thinking.type": "this server's operator has not enabled control of reasoning",
        "tools[].type": "this server calls no tools itself: describe your own, with input_schema",
        ".type": "this server reads text, tool_use and tool_result only",
    }

    def conversation(self, request: Conversation, pieces: Pieces) -> None:
        """Bound and strip what both requests share.

        Raises:
            RequestInvalid: a bound is passed.
        """
        self.hold_number(request.messages)
        if request.messages[-1].__class__ is System:
            raise RequestInvalid("The last message is the user's, or an answer to go on with.", param="messages")
        schemas = self.schemas()
        choice = request.tool_choice
        for number, tool in enumerate(request.tools or ()):
            held = tool.strict or (choice is not None and (choice.type == "any" or choice.name == tool.name))
            place = f"tools[{number}].input_schema"
            tool.input_schema = schemas.take(tool.input_schema, place, compiled=bool(held))
            tool.cache_control = tool.type = None
        if request.output_config is not None:
            self._check_format(request.output_config, schemas)
        self._check_choice(request)
        request.cache_control = None
        if isinstance(request.system, Raw) and not is_text(request.system):
            given = request.system
            request.system = UNSET if is_null(given) else _blocks(given, _BLOCKS, "system", pieces)
        for number, message in enumerate(request.messages):
            if not is_text(message.content):
                place = f"messages[{number}].content"
                message.content = _blocks(message.content, _DECODERS[type(message)], place, pieces)
        pieces.hold_depth("messages")

    def _check_format(self, config: OutputConfig, schemas: SchemaBudget) -> None:
        if config.format is not None:
            config.format.schema = schemas.take(config.format.schema, "output_config.format.schema")

    def _check_choice(self, request: Conversation) -> None:
        choice = request.tool_choice
        if not request.tools:
            if choice is not None and choice.type in ("any", "tool"):
                raise RequestInvalid("tool_choice goes with tools.", param="tool_choice")
            request.tools = None
            request.tool_choice = ToolChoice("none")  # without it vLLM would look for calls in the answer's text
            return
        names = {tool.name for tool in request.tools}
        if len(names) < len(request.tools):
            raise RequestInvalid("Two tools have the same name.", param="tools")
        if choice is not None and choice.type == "tool" and choice.name not in names:
            raise RequestInvalid("tool_choice names a tool that is not in tools.", param="tool_choice.name")
        if (choice is None or choice.type == "auto") and not self.bounds.calls_tools:
            raise RequestInvalid(f"tool_choice 'auto' {NO_PARSER}", param="tool_choice", code="unsupported_parameter")

    def error(self, error: Exception, request_id: str) -> ErrorAnswer:
        told = super().error(error, request_id)
        body = respelt(told.status, told.body, request_id)
        headers = [(name, value) for name, value in told.headers if name != b"content-length"]
        return ErrorAnswer(told.status, body, [*headers, (b"content-length", b"%d" % len(body))])

    def error_event(self, error: Exception, request_id: str) -> bytes:
        return b"event: error\ndata: " + self.error(error, request_id).body + b"\n\n"


def _blocks(content: Raw, decoder: ListDecoder, place: str, pieces: Pieces, *, is_within: bool = False) -> Any:
    """Blocks without the marks that do nothing here.

    Raises:
        RequestInvalid: they are none that this call knows, or a bound is passed.
    """
    blocks = pieces.parts(decoder, content, place, within=is_within)
    for number, block in enumerate(blocks):
        block.cache_control = None
        kind = block.__class__
        if kind is TextBlock:
            if not is_text(block.text):
                not_text(f"{place}[{number}].text")
            block.citations = None
        elif kind is ToolUse:
            pieces.count_calls(1, place)
            pieces.hold(block.input, place)
        elif kind is ToolResult:
            given = block.content
            if given is not UNSET and not is_text(given):
                within = f"{place}[{number}].content"
                block.content = UNSET if is_null(given) else _blocks(given, _BLOCKS, within, pieces, is_within=True)
        elif kind is Thought:
            hold_text(block.thinking, f"{place}[{number}].thinking")
            if block.signature is not UNSET and not is_text(block.signature):
                hold_null(block.signature, f"{place}[{number}].signature")
                block.signature = UNSET
        else:
            hold_text(block.data, f"{place}[{number}].data")
    return blocks


_CUT: Final = re.compile(r": line \d+ column \d+ \(char \d+\)$")


class Messages(Spoken):
    """The key may come in `x-api-key`; `anthropic-version` and `anthropic-beta` are taken and do nothing."""

    path = "/v1/messages"
    upstream_path = "/v1/messages"
    request = MessagesRequest
    opt_in: ClassVar = frozenset({"chat_template_kwargs", "thinking"})

    def bound(self, request: Any, size: int, pieces: Pieces) -> Checked:
        self.conversation(request, pieces)
        stream = bool(request.stream)
        affinity = request.metadata.user_id if request.metadata is not None else None
        request.metadata = request.service_tier = request.inference_geo = None
        return Checked(
            model=request.model,
            stream=stream,
            request=request,
            length_field="max_tokens",
            length_param="max_tokens",
            length=self.length(request.max_tokens, "max_tokens"),
            own_length=True,
            choices=1,
            prompt_bytes=size,
            affinity=affinity,
        )

    def stream(self, engine_name: str, checked: Checked) -> Stream:
        return MessageEvents(engine_name, checked.model, checked.prompt_bytes)

    def refusal(self, status: int, body: bytes, checked: Checked) -> GatewayError:
        if status == 400 and _CUT.search(read_error(body).message):  # vLLM 0.32 reads a tool's input before it answers
            return RequestInvalid(
                "The answer ended within a tool's input: allow it more tokens, or stream it.", param="max_tokens"
            )
        return super().refusal(status, body, checked)

    def whole(self, engine_name: str, checked: Checked, body: bytes) -> tuple[bytes, Usage]:
        try:
            message = msgspec.json.decode(body, type=Answer)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ReplicaFailed("The engine's answer cannot be read; try again.") from error
        return ENCODER.encode(message.told(checked.model)), message.usage.counted()


class MessageEvents(NamedEvents):
    """`message_start` … `message_stop`."""

    passed: ClassVar = frozenset({b"content_block_start", b"content_block_stop", b"ping"})
    deltas: ClassVar = frozenset({b"content_block_delta"})

    def rewritten(self, name: bytes, data: bytes) -> bytes:
        if name == b"message_start":
            message = msgspec.json.decode(data, type=Start).message
            self._count(message.usage)
            return ENCODER.encode({"type": "message_start", "message": message.told(self.shown_name)})
        if name == b"message_delta":
            delta = msgspec.json.decode(data, type=Delta)
            self._count(delta.usage)
            self.is_counted = True
            return ENCODER.encode({"type": "message_delta", "delta": delta.delta, "usage": delta.usage.told()})
        if name == b"message_stop":
            self.finished = True
            return data
        if name == b"error":
            raise ReplicaFailed(BROKE_OFF)
        return b""

    def _count(self, counted: ToldUsage) -> None:
        self._counted = counted.counted()


TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def respelt(status: int, body: bytes, request_id: str) -> bytes:
    """OpenAI's error envelope as Anthropic's."""
    message = msgspec.json.decode(body, type=ToldError).error.message
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    return ENCODER.encode({"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id})
