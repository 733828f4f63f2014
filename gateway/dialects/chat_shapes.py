"""What chat and plain completions may hold, in OpenAI's words: the types that a body is decoded into.

The rules that no type can say are in `chat.py`.
"""

from typing import Annotated, Final, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from gateway.dialects.dialect import MOST_TOOLS
from gateway.dialects.fields import (
    CallId,
    Description,
    Label,
    LogitBias,
    Metadata,
    ModelName,
    Name,
    Nothing,
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


class TextPart(Struct, forbid_unknown_fields=True, tag_field="type", tag="text", gc=False):
    text: Raw


class RefusalPart(Struct, forbid_unknown_fields=True, tag_field="type", tag="refusal", gc=False):
    refusal: Raw


MOST_PARTS: Final = 256
"""Of one message."""
Speaker = Annotated[str, Meta(max_length=64)] | None


class Told(Struct, forbid_unknown_fields=True, omit_defaults=True, tag_field="role", kw_only=True, gc=False):
    """What all messages but the model's and the tools' have."""

    content: Raw
    name: Speaker = None


class System(Told, tag="system"):
    pass


class Developer(Told, tag="developer"):
    pass


class User(Told, tag="user"):
    pass


class CalledFunction(Struct, forbid_unknown_fields=True, gc=False):
    name: ToolName
    arguments: Raw


class ToolCall(Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    id: CallId
    function: CalledFunction
    type: Literal["function"] | None = None
    index: int | None = None


class Assistant(
    Struct, forbid_unknown_fields=True, omit_defaults=True, tag_field="role", tag="assistant", kw_only=True, gc=False
):
    """An answer of the model, as it was answered or as a client writes it."""

    content: Raw | UnsetType = UNSET
    tool_calls: Raw | UnsetType = UNSET
    name: Speaker = None
    reasoning: Raw | UnsetType = UNSET
    reasoning_content: Raw | UnsetType = UNSET
    refusal: Raw | UnsetType = UNSET
    annotations: Nothing = None
    audio: None = None
    function_call: None = None


class ToolResult(
    Struct, forbid_unknown_fields=True, omit_defaults=True, tag_field="role", tag="tool", kw_only=True, gc=False
):
    content: Raw
    tool_call_id: CallId
    name: Speaker = None


Message = System | Developer | User | Assistant | ToolResult


class Function(Struct, forbid_unknown_fields=True, omit_defaults=True):
    name: ToolName
    description: Description | None = None
    parameters: Raw | UnsetType = UNSET
    strict: bool | None = None


class Tool(Struct, forbid_unknown_fields=True):
    function: Function
    type: Literal["function"] = "function"


class NamedFunction(Struct, forbid_unknown_fields=True):
    name: ToolName


class NamedTool(Struct, forbid_unknown_fields=True):
    function: NamedFunction
    type: Literal["function"] = "function"


class JsonSchema(Struct, forbid_unknown_fields=True, omit_defaults=True):
    name: Name
    schema: Raw | UnsetType = UNSET
    description: Annotated[str, Meta(max_length=1_024)] | None = None
    strict: bool | None = None


class ResponseFormat(Struct, forbid_unknown_fields=True, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(Struct, forbid_unknown_fields=True, omit_defaults=True):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


UPSTREAM_STREAM: Final = StreamOptions(include_usage=True, continuous_usage_stats=True)
"""Usage in every event, so that a stream that is cut anywhere is counted exactly; the relay takes it out again."""


class Sampling(Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What chat and completion requests share."""

    model: ModelName
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    max_tokens: Positive | None = None
    min_p: Unit | None = None
    min_tokens: Annotated[int, Meta(ge=0)] | None = None
    n: Positive | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: RepetitionPenalty | None = None
    response_format: ResponseFormat | None = None
    seed: Seed | None = None
    stop: Stop | None = None
    stop_token_ids: StopTokens | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None

    metadata: Metadata | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    safety_identifier: Label | None = None
    service_tier: Label | None = None
    store: bool | None = None
    user: Label | None = None


class ChatRequest(Sampling, kw_only=True):
    messages: Annotated[list[Message], Meta(min_length=1)]
    logprobs: bool | None = None
    max_completion_tokens: Positive | None = None
    parallel_tool_calls: bool | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    tools: Annotated[list[Tool], Meta(min_length=1, max_length=MOST_TOOLS)] | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=20)] | None = None


class CompletionRequest(Sampling, kw_only=True):
    prompt: Raw
    logprobs: Annotated[int, Meta(ge=0, le=5)] | None = None
