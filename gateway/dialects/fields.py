"""Fields of requests, whatever the endpoint: their bounds, and why some are not taken.

Every field of vLLM 0.32's request classes stands, for each endpoint, in exactly one class: accepted within bounds (a
field of that endpoint's request), in `OPT_IN` (the operator may allow it), in `GATEWAY_SET`, or in `REFUSED` with the
reason a client is told. A test holds that against the installed vLLM, names the two that are in two classes by their
value (`background`, `thinking`), and compares what is within a request (tools, formats, messages, parts) likewise.
"""

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

Unit = Annotated[float, Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, Meta(ge=-2.0, le=2.0)]
Text = Annotated[str, Meta(max_length=1 << 20)]
Name = Annotated[str, Meta(min_length=1, max_length=64)]
Label = Annotated[str, Meta(max_length=512)]
CallId = Annotated[str, Meta(min_length=1, max_length=128)]
ModelName = Annotated[str, Meta(min_length=1, max_length=256)]
Positive = Annotated[int, Meta(ge=1, le=(1 << 31) - 1)]
TokenId = Annotated[int, Meta(ge=0, le=(1 << 31) - 1)]
Seed = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Temperature = Annotated[float, Meta(ge=0.0, le=2.0)]
TopP = Annotated[float, Meta(gt=0.0, le=1.0)]
TopK = Annotated[int, Meta(ge=-1, le=1 << 20)]
RepetitionPenalty = Annotated[float, Meta(gt=0.0, le=10.0)]
StopText = Annotated[str, Meta(min_length=1, max_length=128)]
StopTexts = Annotated[list[StopText], Meta(max_length=16)]
Stop = StopText | StopTexts
StopTokens = Annotated[list[TokenId], Meta(max_length=16)]
LogitBias = Annotated[
    dict[Annotated[str, Meta(min_length=1, max_length=10)], Annotated[float, Meta(ge=-100, le=100)]],
    Meta(max_length=1_024),
]
Metadata = Annotated[dict[Annotated[str, Meta(max_length=64)], Label], Meta(max_length=16)]
ToolName = Annotated[str, Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
Description = Annotated[str, Meta(max_length=16_384)]
Nothing = Annotated[list[None], Meta(max_length=0)] | None
"""A field that an answer carries empty, and that comes back with it as history."""

GATEWAY_SET: Final = frozenset({"model", "cache_salt", "priority", "request_id"})

_TEMPLATE = "the chat template is the base model's own"
_ENGINE = "it reaches into the engine"
_OUTPUT = "it changes what others rely on in the answer's form"
_MEDIA = "this server reads text only"
_COST = "its cost falls on other tenants"
_STATE = "this server keeps no conversations: send the whole of it as input"
_OLD_TOOLS = "use tools and tool_choice"
_NO_REASONING = "this server's operator has not enabled control of reasoning"
_MEANT = "send the text that is meant"
REFUSED: Final[dict[str, str]] = {
    "add_generation_prompt": _TEMPLATE,
    "add_special_tokens": _TEMPLATE,
    "audio": _MEDIA,
    "background": _STATE,
    "best_of": _COST,
    "chat_template": _TEMPLATE,
    "container": "this server runs no code",
    "context_management": _STATE,
    "continue_final_message": _TEMPLATE,
    "conversation": _STATE,
    "documents": _TEMPLATE,
    "ec_transfer_params": _ENGINE,
    "enable_response_messages": _OUTPUT,
    "function_call": _OLD_TOOLS,
    "functions": _OLD_TOOLS,
    "guided_choice": "use response_format",
    "guided_grammar": "use response_format",
    "guided_json": "use response_format",
    "guided_regex": "use response_format",
    "ignore_eos": _COST,
    "kv_transfer_params": _ENGINE,
    "length_penalty": _COST,
    "logits_processors": _ENGINE,
    "logprob_token_ids": _COST,
    "max_tool_calls": "this server calls no tools itself",
    "mcp_servers": "this server calls no tools itself",
    "media_io_kwargs": _MEDIA,
    "mm_payload": _MEDIA,
    "mm_processor_kwargs": _MEDIA,
    "modalities": _MEDIA,
    "moderation": "this server moderates nothing",
    "prediction": "this server takes no predicted output",
    "previous_input_messages": _STATE,
    "previous_response_id": _STATE,
    "prompt_embeds": _ENGINE,
    "repetition_detection": _ENGINE,
    "return_mm_kwargs": _ENGINE,
    "return_prompt_text": _OUTPUT,
    "return_token_offsets": _OUTPUT,
    "return_token_strs": "this call counts",
    "routed_experts_prompt_start": _ENGINE,
    "session_id": _ENGINE,
    "spaces_between_special_tokens": _OUTPUT,
    "stream_interval": _OUTPUT,
    "structured_outputs": "use response_format",
    "suffix": "the base model does not fill in the middle",
    "truncation_side": _MEANT,
    "use_beam_search": _COST,
    "verbosity": "say it in the prompt",
    "vllm_xargs": _ENGINE,
    "watermarking": _OUTPUT,
    "web_search_options": "this server searches nothing",
}
"""Why a field is not taken, told to whoever sends it; `prompt` of the Responses API has its own (see there)."""

Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class TemplateArguments(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Switches of known chat templates; anything else could be a name that the renderer itself takes."""

    enable_thinking: bool | None = None
    thinking: bool | None = None
    thinking_budget: Annotated[int, Meta(ge=0, le=1 << 20)] | None = None
    reasoning_effort: Effort | None = None


class ReasoningOptions(Struct, forbid_unknown_fields=True, omit_defaults=True):
    """Of the Responses API."""

    effort: Effort | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None


class ThinkingOff(Struct, forbid_unknown_fields=True, tag_field="type", tag="disabled"):
    """Of the Messages API."""


class ThinkingOn(Struct, forbid_unknown_fields=True, tag_field="type", tag="enabled"):
    budget_tokens: Annotated[int, Meta(ge=1_024, le=1 << 20)]


class ThinkingAdaptive(Struct, forbid_unknown_fields=True, tag_field="type", tag="adaptive"):
    pass


OPT_IN: Final[dict[str, tuple[object, str]]] = {
    "allowed_token_ids": (Annotated[list[TokenId], Meta(min_length=1, max_length=1_024)], _COST),
    "bad_words": (Annotated[list[StopText], Meta(max_length=64)], _COST),
    "chat_template_kwargs": (TemplateArguments, _TEMPLATE),
    "echo": (bool, _OUTPUT),
    "include_reasoning": (bool, _OUTPUT),
    "include_stop_str_in_output": (bool, _OUTPUT),
    "prompt_logprobs": (Annotated[int, Meta(ge=0, le=5)], _COST),
    "reasoning": (ReasoningOptions, _NO_REASONING),
    "reasoning_effort": (Effort, _NO_REASONING),
    "return_token_ids": (bool, _OUTPUT),
    "return_tokens_as_token_ids": (bool, _OUTPUT),
    "skip_special_tokens": (bool, _OUTPUT),
    "thinking": (ThinkingOff | ThinkingOn | ThinkingAdaptive, _NO_REASONING),
    "thinking_token_budget": (Annotated[int, Meta(ge=0, le=1 << 20)], _NO_REASONING),
    "truncate_prompt_tokens": (Annotated[int, Meta(ge=1, le=1 << 20)], _MEANT),
}
"""What `TAILOR_ALLOWED_FIELDS` may name: type with bounds, and the reason told where it is not named."""


class EngineError(Struct):
    """What is read of an error of the engine's."""

    message: str = ""
    param: str | None = None
    code: int | str | None = None  # vLLM's are statuses


class EngineRefusal(Struct):
    """The body of the engine's refusal."""

    error: EngineError
