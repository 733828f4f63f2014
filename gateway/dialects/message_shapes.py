"""What `/v1/messages` may hold, in Anthropic's words, and what vLLM answers: the types that both are decoded into.

The rules that no type can say are in `messages.py`.
"""

from typing import Annotated, Any, Final, Literal

from msgspec import UNSET, Meta, Raw, Struct, UnsetType

from gateway.dialects.dialect import MOST_TOOLS
from gateway.dialects.events import usage
from gateway.dialects.fields import (
    CallId,
    Description,
    Label,
    ModelName,
    Positive,
    StopTexts,
    ThinkingOff,
    ToolName,
    TopK,
    TopP,
    Unit,
)
from gateway.tokens import Usage

MOST_BLOCKS: Final = 256
"""Of one message."""


class CacheControl(Struct, forbid_unknown_fields=True):
    """Taken and dropped: the prefix cache needs no marks."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Struct, forbid_unknown_fields=True, omit_defaults=True, tag_field="type", kw_only=True, gc=False):
    cache_control: CacheControl | None = None


class TextBlock(Block, tag="text", gc=False):
    text: Raw
    citations: Annotated[list[None], Meta(max_length=0)] | None = None


class ToolUse(Block, tag="tool_use", gc=False):
    id: CallId
    name: ToolName
    input: Raw


class ToolResult(Block, tag="tool_result", gc=False):
    tool_use_id: CallId
    content: Raw | UnsetType = UNSET
    is_error: bool | None = None


class Thought(Block, tag="thinking", gc=False):
    thinking: Raw
    signature: Raw | UnsetType = UNSET


class HiddenThought(Block, tag="redacted_thinking", gc=False):
    data: Raw


class User(Struct, forbid_unknown_fields=True, tag_field="role", tag="user", gc=False):
    content: Raw


class Assistant(Struct, forbid_unknown_fields=True, tag_field="role", tag="assistant", gc=False):
    content: Raw


class System(Struct, forbid_unknown_fields=True, tag_field="role", tag="system", gc=False):
    content: Raw


Message = User | Assistant | System


class Tool(Struct, forbid_unknown_fields=True, omit_defaults=True):
    name: ToolName
    input_schema: Raw
    description: Description | None = None
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None


class ToolChoice(Struct, forbid_unknown_fields=True, omit_defaults=True):
    type: Literal["auto", "any", "tool", "none"]
    name: ToolName | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Struct, forbid_unknown_fields=True):
    schema: Raw
    type: Literal["json_schema"] = "json_schema"


class OutputConfig(Struct, forbid_unknown_fields=True, omit_defaults=True):
    format: OutputFormat | None = None


class RequestMetadata(Struct, forbid_unknown_fields=True):
    user_id: Label | None = None


class Conversation(Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What a request and the count of its tokens share."""

    model: ModelName
    messages: Annotated[list[Message], Meta(min_length=1)]
    system: Raw | UnsetType = UNSET
    tools: Annotated[list[Tool], Meta(max_length=MOST_TOOLS)] | None = None
    tool_choice: ToolChoice | None = None
    output_config: OutputConfig | None = None
    thinking: ThinkingOff | None = None
    cache_control: CacheControl | None = None


class MessagesRequest(Conversation, kw_only=True):
    max_tokens: Positive
    stop_sequences: StopTexts | None = None
    stream: bool | None = None
    temperature: Unit | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None

    metadata: RequestMetadata | None = None
    service_tier: Label | None = None
    inference_geo: Label | None = None


class ToldUsage(Struct, omit_defaults=True):
    input_tokens: int = 0
    output_tokens: int = 0
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None

    def counted(self) -> Usage:
        cached = self.cache_read_input_tokens
        prompt = self.input_tokens + (cached or 0) + (self.cache_creation_input_tokens or 0)
        return usage(prompt, cached, self.output_tokens)

    def told(self) -> dict[str, Any]:
        """All members: clients take none of them for absent."""
        return {
            "input_tokens": self.input_tokens,
            "cache_creation_input_tokens": self.cache_creation_input_tokens or 0,
            "cache_read_input_tokens": self.cache_read_input_tokens or 0,
            "output_tokens": self.output_tokens,
        }


class Answer(Struct):
    id: str
    usage: ToldUsage
    content: Raw = Raw(b"[]")
    stop_reason: str | None = None
    stop_sequence: str | None = None

    def told(self, model: str) -> dict[str, Any]:
        return {
            "id": "msg_" + self.id.rpartition("-")[2],
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": self.content,
            "stop_reason": self.stop_reason,
            "stop_sequence": self.stop_sequence,
            "usage": self.usage.told(),
        }


class Start(Struct):
    message: Answer


class Delta(Struct):
    delta: Raw
    usage: ToldUsage


class Envelope(Struct):
    message: str


class ToldError(Struct):
    error: Envelope
