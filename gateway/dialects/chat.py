"""`POST /v1/chat/completions` and `/v1/completions`, as OpenAI has them."""

from typing import Any, ClassVar, Final

from msgspec import UNSET, Raw, UnsetType

from gateway.dialects.chat_shapes import (
    MOST_PARTS,
    UPSTREAM_STREAM,
    Assistant,
    ChatRequest,
    CompletionRequest,
    Message,
    NamedTool,
    RefusalPart,
    ResponseFormat,
    TextPart,
    Tool,
    ToolCall,
)
from gateway.dialects.dialect import MOST_TOOLS, Checked, Dialect, Stream, check_entries, highest_ids
from gateway.dialects.lists import ListDecoder
from gateway.dialects.schemas import SchemaBudget
from gateway.dialects.words import (
    MOST_TOKENS,
    MOST_VALUES,
    Pieces,
    hold_null,
    hold_text,
    hold_tokens,
    is_null,
    is_text,
)
from gateway.errors import ReplicaFailed, RequestInvalid
from gateway.relay import StreamTranslation, Translation
from gateway.tokens import Usage

NO_PARSER: Final = (
    "is not available: this server's operator has set no parser for the base model's tool calls. "
    "Name one function, or require a call."
)


IGNORED: Final = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
"""Fields of OpenAI's API that do nothing here and no harm."""
OPT_IN_SAMPLING: Final = frozenset(
    {
        "allowed_token_ids",
        "bad_words",
        "echo",
        "include_stop_str_in_output",
        "prompt_logprobs",
        "return_token_ids",
        "return_tokens_as_token_ids",
        "skip_special_tokens",
        "thinking_token_budget",
        "truncate_prompt_tokens",
    }
)


class OpenAIGeneration(Dialect):
    """What chat and plain completions share."""

    def _checked(
        self,
        request: Any,
        size: int,
        param: str,
        default: int | None,
        alternatives: int,
        prompt_tokens: int | None = None,
    ) -> Checked:
        stream = bool(request.stream)
        if request.stream_options is not None and not stream:
            raise RequestInvalid("stream_options goes with stream: true.", param="stream_options")
        if request.n is not None and request.n > self.bounds.max_choices:
            raise RequestInvalid(f"n may be at most {self.bounds.max_choices} on this server.", param="n")
        ids = highest_ids(request.logit_bias, request.stop_token_ids)
        length = self.length(request.max_tokens, param, default)
        check_entries(request.n or 1, length, alternatives, param)
        if request.min_tokens is not None and request.min_tokens > length:
            raise RequestInvalid(f"min_tokens is above {param}.", param="min_tokens")
        checked = Checked(
            model=request.model,
            stream=stream,
            request=request,
            length_field="max_tokens",
            length_param=param,
            length=length,
            own_length=request.max_tokens is not None,
            choices=request.n or 1,
            prompt_bytes=size,
            prompt_tokens=prompt_tokens,
            affinity=request.prompt_cache_key or request.user,
            scores_prompt=self.prompt_scores(request) if self.opted_in else "",
            wants_usage=bool(request.stream_options and request.stream_options.include_usage),
            highest_ids=ids,
        )
        for name in IGNORED:
            setattr(request, name, None)
        request.stream_options = UPSTREAM_STREAM if stream else None
        return checked

    def prompt_scores(self, request: Any) -> str:
        """The field by which logprobs of the prompt itself are asked for; "" where they are not.

        vLLM 0.32 takes `echo` for one: of a chat always, for its `top_logprobs` are 0 there where they are not sent.
        """
        if isinstance(getattr(request, "prompt_logprobs", UNSET), int):
            return "prompt_logprobs"
        return "echo" if getattr(request, "echo", UNSET) is True and self.echo_scores(request) else ""

    def echo_scores(self, request: Any) -> bool:
        """Whether `echo` is logprobs of the prompt too."""
        return True

    def _check_format(self, response_format: ResponseFormat, schemas: SchemaBudget) -> None:
        if (response_format.type == "json_schema") != (response_format.json_schema is not None):
            raise RequestInvalid("json_schema goes with type 'json_schema', and only with it.", param="response_format")
        described = response_format.json_schema
        if described is not None:
            if not isinstance(described.schema, Raw):
                raise RequestInvalid("A json_schema needs a schema.", param="response_format.json_schema.schema")
            described.schema = schemas.take(described.schema, "response_format.json_schema.schema")

    def stream(self, engine_name: str, checked: Checked) -> Stream:
        return StreamTranslation(engine_name, checked.model, wants_usage=checked.wants_usage)

    def whole(self, engine_name: str, checked: Checked, body: bytes) -> tuple[bytes, Usage]:
        translation = Translation(engine_name, checked.model)
        told = translation.whole(body)
        usage = translation.usage
        if usage is None:
            raise ReplicaFailed("The engine's answer cannot be read; try again.")
        return told, usage


class Chat(OpenAIGeneration):
    path = "/v1/chat/completions"
    upstream_path = "/v1/chat/completions"
    prompt_param = "messages"
    request = ChatRequest
    message = Message
    opt_in = OPT_IN_SAMPLING | {"chat_template_kwargs", "include_reasoning", "reasoning_effort"}
    hints: ClassVar = {".type": "this server reads text and calls functions only", ".audio": "text only"}

    def bound(self, request: ChatRequest, size: int, pieces: Pieces) -> Checked:
        self.hold_number(request.messages)
        param = "max_tokens"
        if request.max_completion_tokens is not None:
            if request.max_tokens is not None:
                raise RequestInvalid("Send max_completion_tokens or max_tokens, not both.", param="max_tokens")
            param = "max_completion_tokens"
            request.max_tokens, request.max_completion_tokens = request.max_completion_tokens, None
        if request.top_logprobs and not request.logprobs:
            raise RequestInvalid("top_logprobs goes with logprobs: true.", param="top_logprobs")
        self._check_choice(request)
        if request.response_format is not None or request.tools is not None:
            schemas = self.schemas()
            if request.response_format is not None:
                self._check_format(request.response_format, schemas)
            if request.tools is not None:
                check_tools(request.tools, schemas, request.tool_choice)
        check_messages(request.messages, pieces)
        return self._checked(request, size, param, None, request.top_logprobs or 0)

    def _check_choice(self, request: ChatRequest) -> None:
        choice = request.tool_choice
        if request.tools is None:
            if choice not in (None, "none", "auto"):
                raise RequestInvalid("tool_choice goes with tools.", param="tool_choice")
            request.tool_choice = request.parallel_tool_calls = None
            return
        if isinstance(choice, NamedTool):
            if all(tool.function.name != choice.function.name for tool in request.tools):
                raise RequestInvalid("tool_choice names a function that is not in tools.", param="tool_choice")
        elif choice in (None, "auto") and not self.bounds.calls_tools:
            raise RequestInvalid(f"tool_choice 'auto' {NO_PARSER}", param="tool_choice", code="unsupported_parameter")


_PARTS: Final = ListDecoder(TextPart, least=1, most=MOST_PARTS)
_ANSWER_PARTS: Final = ListDecoder(TextPart | RefusalPart, least=1, most=MOST_PARTS)
_CALLS: Final = ListDecoder(ToolCall, most=MOST_TOOLS)


def check_messages(messages: list[Message], pieces: Pieces) -> None:
    """Hold what messages say, and the depth of what functions were given: vLLM parses it for the chat template.

    Raises:
        RequestInvalid: a content is neither text nor parts of text, or a bound is passed.
    """
    for number, message in enumerate(messages):
        content = message.content
        if isinstance(content, Raw) and not is_text(content):
            message.content = _parts(message, content, f"messages[{number}].content", pieces)
        if isinstance(message, Assistant):
            if isinstance(message.reasoning, Raw):
                message.reasoning = _thought(message.reasoning, f"messages[{number}].reasoning")
            if isinstance(message.reasoning_content, Raw):
                message.reasoning_content = _thought(message.reasoning_content, f"messages[{number}].reasoning_content")
            if isinstance(message.refusal, Raw):
                message.refusal = _thought(message.refusal, f"messages[{number}].refusal")
            if isinstance(message.tool_calls, Raw):
                message.tool_calls = _calls(message.tool_calls, f"messages[{number}].tool_calls", pieces)
    pieces.hold_depth("messages")


def _thought(told: Raw, place: str) -> Raw | UnsetType:
    if is_text(told):
        return told
    hold_null(told, place)
    return UNSET


def _calls(given: Raw, place: str, pieces: Pieces) -> Any:
    if is_null(given):
        return UNSET
    calls = pieces.calls(_CALLS, given, place)
    for call in calls:
        call.index, call.type = None, "function"
        arguments = call.function.arguments
        if not is_text(arguments):
            raise RequestInvalid(f"{place}: arguments are JSON in a string.", param=place)
        pieces.hold(arguments, place)
    return calls


def _parts(message: Message, content: Raw, place: str, pieces: Pieces) -> Any:
    answered = isinstance(message, Assistant)
    if answered and is_null(content):
        return UNSET
    parts = pieces.parts(_ANSWER_PARTS if answered else _PARTS, content, place)
    for part in parts:
        hold_text(part.refusal if isinstance(part, RefusalPart) else part.text, place)
    return parts


def check_tools(tools: list[Tool], schemas: SchemaBudget, choice: str | NamedTool | None) -> None:
    """Hold what functions may cost.

    Raises:
        RequestInvalid: a name comes twice, or a schema passes a bound.
    """
    names = {tool.function.name for tool in tools}
    if len(names) < len(tools):
        raise RequestInvalid("Two tools have the same name.", param="tools")
    named = choice.function.name if isinstance(choice, NamedTool) else None
    for number, tool in enumerate(tools):
        if isinstance(tool.function.parameters, Raw):
            place = f"tools[{number}].function.parameters"
            held = tool.function.strict or choice == "required" or tool.function.name == named
            tool.function.parameters = schemas.take(
                tool.function.parameters, place, compiled=bool(held), may_be_null=True
            )


class Completions(OpenAIGeneration):
    path = "/v1/completions"
    upstream_path = "/v1/completions"
    prompt_param = "prompt"
    request = CompletionRequest
    opt_in = OPT_IN_SAMPLING
    most_values = MOST_TOKENS + MOST_VALUES

    def echo_scores(self, request: CompletionRequest) -> bool:
        return request.logprobs is not None

    def bound(self, request: CompletionRequest, size: int, pieces: Pieces) -> Checked:
        if request.response_format is not None:
            self._check_format(request.response_format, self.schemas())
        tokens = None if is_text(request.prompt) else hold_tokens(request.prompt, "prompt")
        # OpenAI's default of a plain completion is 16; a chat runs to the model's end, within our ceiling
        return self._checked(request, size, "max_tokens", 16, request.logprobs or 0, tokens)
