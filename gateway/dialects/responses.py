"""`POST /v1/responses`, as OpenAI has it, without state: vLLM would keep that in one engine, for all tenants."""

from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
from msgspec import UNSET, Meta, Raw, Struct, UnsetType, field

from gateway.dialects.chat import NO_PARSER
from gateway.dialects.chat_shapes import StreamOptions
from gateway.dialects.dialect import ENCODER, MOST_TOOLS, Bounds, Checked, Dialect, Stream, check_entries, highest_ids
from gateway.dialects.events import NamedEvents, usage
from gateway.dialects.fields import (
    REFUSED,
    CallId,
    Description,
    Label,
    LogitBias,
    Metadata,
    ModelName,
    Name,
    Penalty,
    Positive,
    RepetitionPenalty,
    Seed,
    Stop,
    StopTokens,
    Temperature,
    ToolName,
    TopK,
    TopP,
    Unit,
)
from gateway.dialects.lists import ListDecoder
from gateway.dialects.schemas import SchemaBudget
from gateway.dialects.words import Pieces, hold_text, is_null, is_text, not_text
from gateway.errors import ReplicaFailed, RequestInvalid
from gateway.relay import BROKE_OFF
from gateway.tokens import Usage

Status = Literal["in_progress", "completed", "incomplete"]


class TextPart(Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True, gc=False):
    """Of a message or of a tool's output; what comes back from an answer carries more than is read."""

    type: Literal["input_text", "output_text", "text", "refusal", "reasoning_text"]
    text: Raw | UnsetType = UNSET
    refusal: Raw | UnsetType = UNSET
    annotations: Raw | UnsetType = UNSET
    logprobs: Raw | UnsetType = UNSET


MOST_PARTS: Final = 256
"""Of one item."""


class Item(Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True, gc=False):
    """One item of the input: a message, a call of a function, its output, or a thought (which is dropped)."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] | UnsetType = UNSET
    id: Label | None = None
    status: Status | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Raw | UnsetType = UNSET
    phase: Label | None = None
    call_id: CallId | None = None
    name: ToolName | None = None
    namespace: None = None
    caller: None = None
    is_async: Literal[False] | None = field(default=None, name="async")
    async_: None = None  # vLLM 0.32 spells it so in a whole answer, and clients send calls back as they came
    arguments: Raw | UnsetType = UNSET
    output: Raw | UnsetType = UNSET
    summary: Raw | UnsetType = UNSET
    encrypted_content: Raw | UnsetType = UNSET


class Tool(Struct, forbid_unknown_fields=True, omit_defaults=True):
    type: Literal["function"]
    name: ToolName
    description: Description | None = None
    parameters: Raw | UnsetType = UNSET
    strict: bool | None = None


class NamedTool(Struct, forbid_unknown_fields=True):
    name: ToolName
    type: Literal["function"] = "function"


class Format(Struct, forbid_unknown_fields=True, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    name: Name | None = None
    schema: Raw | UnsetType = UNSET
    description: Annotated[str, Meta(max_length=1_024)] | None = None
    strict: bool | None = None


class TextOptions(Struct, forbid_unknown_fields=True, omit_defaults=True):
    format: Format | None = None
    verbosity: Literal["medium"] | None = None


Included = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]


class Asked(Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What a request and the count of its tokens share."""

    model: ModelName
    input: Raw
    instructions: Raw | UnsetType = UNSET
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    tools: Annotated[list[Tool], Meta(max_length=MOST_TOOLS)] | None = None
    truncation: Literal["disabled"] | None = None


class ResponsesRequest(Asked, kw_only=True):
    frequency_penalty: Penalty | None = None
    include: Annotated[list[Included], Meta(max_length=8)] | None = None
    logit_bias: LogitBias | None = None
    max_output_tokens: Positive | None = None
    min_p: Unit | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: StopTokens | None = None
    stream: bool | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None
    top_p: TopP | None = None

    background: Literal[False] | None = None
    metadata: Metadata | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    safety_identifier: Label | None = None
    service_tier: Label | None = None
    store: bool | None = None
    stream_options: StreamOptions | None = None
    user: Label | None = None


IGNORED: Final = (
    "background",
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "stream_options",
    "truncation",
    "user",
)
_PARTS: Final = ListDecoder(TextPart, most=MOST_PARTS)
LOGPROBS: Final = "message.output_text.logprobs"


class Conversing(Dialect):
    """What both endpoints of this API share."""

    prompt_param = "input"
    refused: ClassVar = {**REFUSED, "prompt": "this server keeps no prompt templates: send input and instructions"}
    hints: ClassVar = {
        "tools[].type": "this server calls no tools itself: describe your own functions",
        "tool_choice.type": "name a function",
        ".type": "this server reads text, function calls and their outputs, and keeps no items",
        "include[]": "only what an answer of this server can hold",
        "background": "this server keeps no answers",
        "truncation": "send the text that is meant",
        "verbosity": "say it in the prompt",
    }

    def __init__(self, bounds: Bounds) -> None:
        super().__init__(bounds)
        self._items = ListDecoder(Item, least=1, most=bounds.max_messages)

    def asked(self, request: Asked) -> None:
        """Bound and simplify what both requests share.

        Raises:
            RequestInvalid: a bound is passed.
        """
        if isinstance(request.instructions, Raw) and not is_text(request.instructions):
            if not is_null(request.instructions):
                raise RequestInvalid("instructions are a string.", param="instructions")
            request.instructions = UNSET
        schemas = self.schemas()
        if request.text is not None:
            _check_text(request.text, schemas)
        self._check_tools(request, schemas)

    def items(self, given: Raw, pieces: Pieces) -> list[Item]:
        """The input's items, simplified; none for a plain text.

        Raises:
            RequestInvalid: it is neither, or a bound is passed.
        """
        if is_text(given):
            return []
        found: list[Item] = pieces.items(self._items, given, "input")
        plain = [self._plain(item, f"input[{n}]", pieces) for n, item in enumerate(found) if item.type != THOUGHT]
        pieces.hold_depth("input")
        if not plain:
            raise RequestInvalid("The input has nothing to answer.", param="input")
        return plain

    def _plain(self, item: Item, place: str, pieces: Pieces) -> Item:
        """An item in the simplest form that vLLM reads alike: of an answer's parts it reads the first only.

        Raises:
            RequestInvalid: a member that its type needs is missing.
        """
        if item.type in (UNSET, "message"):
            if item.role is None or item.content is UNSET:
                raise RequestInvalid(f"{place}: a message has role and content.", param=place)
            return Item(type="message", role=item.role, content=_words(item.content, f"{place}.content", pieces))
        if item.type == "function_call":
            if item.call_id is None or item.name is None or not isinstance(item.arguments, Raw):
                raise RequestInvalid(f"{place}: a function_call has call_id, name and arguments.", param=place)
            if not is_text(item.arguments):
                raise RequestInvalid(f"{place}: arguments are JSON in a string.", param=f"{place}.arguments")
            pieces.count_calls(1, place)
            pieces.hold(item.arguments, f"{place}.arguments")
            return Item(type=item.type, call_id=item.call_id, name=item.name, arguments=item.arguments)
        if item.call_id is None or item.output is UNSET:
            raise RequestInvalid(f"{place}: a function_call_output has call_id and output.", param=place)
        return Item(type=item.type, call_id=item.call_id, output=_words(item.output, f"{place}.output", pieces))

    def _check_tools(self, request: Asked, schemas: SchemaBudget) -> None:
        choice = request.tool_choice
        if not request.tools:
            if choice not in (None, "none", "auto"):
                raise RequestInvalid("tool_choice goes with tools.", param="tool_choice")
            request.tools = request.tool_choice = request.parallel_tool_calls = None
            return
        names = {tool.name for tool in request.tools}
        if len(names) < len(request.tools):
            raise RequestInvalid("Two tools have the same name.", param="tools")
        named = choice.name if isinstance(choice, NamedTool) else None
        for number, tool in enumerate(request.tools):
            if isinstance(tool.parameters, Raw):
                held = tool.strict or choice == "required" or tool.name == named
                place = f"tools[{number}].parameters"
                tool.parameters = schemas.take(tool.parameters, place, compiled=bool(held), may_be_null=True)
        if isinstance(choice, NamedTool):
            if choice.name not in names:
                raise RequestInvalid("tool_choice names a function that is not in tools.", param="tool_choice.name")
        elif choice in (None, "auto") and not self.bounds.calls_tools:
            raise RequestInvalid(f"tool_choice 'auto' {NO_PARSER}", param="tool_choice", code="unsupported_parameter")


THOUGHT: Final = "reasoning"


def _words(content: Raw, place: str, pieces: Pieces) -> Raw:
    if is_text(content):
        return content
    texts = []
    for part in pieces.parts(_PARTS, content, place):
        text = part.text if isinstance(part.text, Raw) else part.refusal
        if not isinstance(text, Raw):
            not_text(place)
        hold_text(text, place)
        texts.append(text)
    if len(texts) == 1:
        return texts[0]
    return Raw(b'"%b"' % b"".join([bytes(text)[1:-1] for text in texts]))


def _check_text(options: TextOptions, schemas: SchemaBudget) -> None:
    options.verbosity = None
    described = options.format
    if described is None:
        return
    if (described.type == "json_schema") != (described.schema is not UNSET):
        raise RequestInvalid("schema goes with type 'json_schema', and only with it.", param="text.format")
    if isinstance(described.schema, Raw):
        if described.name is None:
            raise RequestInvalid("A json_schema has a name.", param="text.format.name")
        described.schema = schemas.take(described.schema, "text.format.schema")
    else:
        described.name = described.description = described.strict = None


class Responses(Conversing):
    path = "/v1/responses"
    upstream_path = "/v1/responses"
    request = ResponsesRequest
    opt_in: ClassVar = frozenset(
        {"chat_template_kwargs", "include_reasoning", "include_stop_str_in_output", "reasoning", "skip_special_tokens"}
    )

    def bound(self, request: Any, size: int, pieces: Pieces) -> Checked:
        self.asked(request)
        items = self.items(request.input, pieces)
        if items:
            request.input = Raw(ENCODER.encode(items))
        logprobs = request.include is not None and LOGPROBS in request.include
        if request.top_logprobs and not logprobs:
            raise RequestInvalid(f"top_logprobs goes with include: ['{LOGPROBS}'].", param="top_logprobs")
        param = "max_output_tokens"
        ids = highest_ids(request.logit_bias, request.stop_token_ids)
        length = self.length(request.max_output_tokens, param)
        check_entries(1, length, request.top_logprobs or 0, param)
        checked = Checked(
            model=request.model,
            stream=bool(request.stream),
            request=request,
            length_field=param,
            length_param=param,
            length=length,
            own_length=request.max_output_tokens is not None,
            choices=1,
            prompt_bytes=size,
            affinity=request.prompt_cache_key or request.user,
            highest_ids=ids,
            own={"metadata": request.metadata or {}, "text": request.text, "user": request.user},
        )
        for name in IGNORED:
            setattr(request, name, None)
        request.include = [LOGPROBS] if logprobs else None
        request.store = False
        return checked

    def stream(self, engine_name: str, checked: Checked) -> Stream:
        return ResponseEvents(engine_name, checked)

    def whole(self, engine_name: str, checked: Checked, body: bytes) -> tuple[bytes, Usage]:
        try:
            return told(body, checked)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ReplicaFailed("The engine's answer cannot be read; try again.") from error

    def error_event(self, error: Exception, request_id: str) -> bytes:
        envelope = msgspec.json.decode(self.error(error, request_id).body)["error"]
        event = {
            "type": "error",
            "code": envelope["code"],
            "message": envelope["message"],
            "param": envelope["param"],
            "sequence_number": 0,
            "error": envelope,  # the openai client raises on it; without it a broken answer would pass for a whole one
        }
        return b"event: error\ndata: " + ENCODER.encode(event) + b"\n\n"


class _Details(Struct, frozen=True):
    cached_tokens: int | None = None


class _Usage(Struct):
    input_tokens: int
    output_tokens: int
    input_tokens_details: _Details = _Details()


class _Counted(Struct):
    object: Literal["response"]
    usage: _Usage | None = None


INNER: Final = ("kv_transfer_params", "ec_transfer_params", "input_messages", "output_messages", "metrics")


def told(body: bytes, checked: Checked) -> tuple[bytes, Usage]:
    """A response object in the client's words, with what it used (nothing yet in a stream's first events)."""
    response = msgspec.json.decode(body, type=dict[str, Raw])
    counted = msgspec.json.decode(body, type=_Counted).usage
    shown: dict[str, Any] = {name: value for name, value in response.items() if name not in INNER}
    shown.update(checked.own, model=checked.model, store=False)
    used = Usage()
    if counted is not None:
        used = usage(counted.input_tokens, counted.input_tokens_details.cached_tokens, counted.output_tokens)
    return ENCODER.encode(shown), used


class _Event(Struct):
    type: str
    response: Raw
    sequence_number: int = 0


class ResponseEvents(NamedEvents):
    """`response.created` … `response.completed`."""

    passed: ClassVar = frozenset(
        name.encode()
        for name in (
            "response.output_item.added",
            "response.output_item.done",
            "response.content_part.added",
            "response.content_part.done",
            "response.output_text.done",
            "response.function_call_arguments.done",
            "response.reasoning_text.done",
            "response.reasoning_part.added",
            "response.reasoning_part.done",
            "response.refusal.done",
        )
    )
    deltas: ClassVar = frozenset(
        {
            b"response.output_text.delta",
            b"response.function_call_arguments.delta",
            b"response.reasoning_text.delta",
            b"response.refusal.delta",
        }
    )
    openings: ClassVar = frozenset({b"response.created", b"response.in_progress"})
    _ends: ClassVar = frozenset({b"response.completed", b"response.incomplete"})

    def __init__(self, engine_name: str, checked: Checked) -> None:
        super().__init__(engine_name, checked.model, checked.prompt_bytes)
        self._checked = checked

    def rewritten(self, name: bytes, data: bytes) -> bytes:
        if name in self.openings or name in self._ends:
            event = msgspec.json.decode(data, type=_Event)
            response, used = told(event.response, self._checked)
            if name in self._ends:
                self._counted = used
                self.is_counted = self.finished = True
            return ENCODER.encode(
                {"type": event.type, "sequence_number": event.sequence_number, "response": Raw(response)}
            )
        if name in (b"error", b"response.failed"):
            raise ReplicaFailed(BROKE_OFF)
        return b""
