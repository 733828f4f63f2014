"""What a tenant may ask of an engine: client body → checked request → upstream body.

The upstream body is built from what was checked, never forwarded. Every field of vLLM 0.32's request classes stands in
exactly one class: it is a field of `ChatRequest` or `CompletionRequest` (passed, bounded), in `GATEWAY_SET`, or in
`REFUSED` with the reason a client is told; a test holds that against the installed vLLM. `IGNORED` are fields of
OpenAI's API that mean nothing here and do no harm.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

import msgspec

from gateway.errors import ContextLengthExceeded, RequestInvalid

Unit = Annotated[float, msgspec.Meta(ge=0.0, le=1.0)]
Penalty = Annotated[float, msgspec.Meta(ge=-2.0, le=2.0)]
Text = Annotated[str, msgspec.Meta(max_length=1 << 20)]
StopText = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Stop = StopText | Annotated[list[StopText], msgspec.Meta(max_length=16)]
TokenId = Annotated[int, msgspec.Meta(ge=0, le=(1 << 31) - 1)]
LogitBias = Annotated[
    dict[
        Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,10}$")],
        Annotated[float, msgspec.Meta(ge=-100, le=100)],
    ],
    msgspec.Meta(max_length=1_024),
]

MOST_ENTRIES: Final = 131_072
"""Tokens with their alternatives in one answer: about 10 MB of JSON."""

GATEWAY_SET: Final = frozenset({"model", "cache_salt", "priority", "request_id"})
IGNORED: Final = ("metadata", "prompt_cache_key", "safety_identifier", "service_tier", "store", "user")

_TEMPLATE = "the chat template is the base model's own"
_ENGINE = "it reaches into the engine"
_OUTPUT = "it changes what others rely on in the answer's form"
_MEDIA = "this server reads text only"
_COST = "its cost falls on other tenants"
_TOOLS = "tool calls are not enabled on this server"
REFUSED: Final[dict[str, str]] = {
    "add_generation_prompt": _TEMPLATE,
    "add_special_tokens": _TEMPLATE,
    "allowed_token_ids": _COST,
    "bad_words": _COST,
    "best_of": _COST,
    "chat_template": _TEMPLATE,
    "chat_template_kwargs": _TEMPLATE,
    "continue_final_message": _TEMPLATE,
    "documents": _TEMPLATE,
    "echo": _OUTPUT,
    "ec_transfer_params": _ENGINE,
    "functions": _TOOLS,
    "function_call": _TOOLS,
    "guided_json": "use response_format",
    "ignore_eos": _COST,
    "include_reasoning": _OUTPUT,
    "include_stop_str_in_output": _OUTPUT,
    "kv_transfer_params": _ENGINE,
    "length_penalty": _COST,
    "logits_processors": _ENGINE,
    "logprob_token_ids": _COST,
    "media_io_kwargs": _MEDIA,
    "mm_payload": _MEDIA,
    "mm_processor_kwargs": _MEDIA,
    "modalities": _MEDIA,
    "audio": _MEDIA,
    "parallel_tool_calls": _TOOLS,
    "prompt_embeds": _ENGINE,
    "prompt_logprobs": _COST,
    "reasoning_effort": "this server's base model does not reason in steps",
    "repetition_detection": _ENGINE,
    "return_mm_kwargs": _ENGINE,
    "return_prompt_text": _OUTPUT,
    "return_token_ids": _OUTPUT,
    "return_token_offsets": _OUTPUT,
    "return_tokens_as_token_ids": _OUTPUT,
    "routed_experts_prompt_start": _ENGINE,
    "session_id": _ENGINE,
    "skip_special_tokens": _OUTPUT,
    "spaces_between_special_tokens": _OUTPUT,
    "stream_interval": _OUTPUT,
    "structured_outputs": "use response_format",
    "suffix": "the base model does not fill in the middle",
    "thinking_token_budget": "this server's base model does not reason in steps",
    "tool_choice": _TOOLS,
    "tools": _TOOLS,
    "truncate_prompt_tokens": "send the text that is meant",
    "truncation_side": "send the text that is meant",
    "use_beam_search": _COST,
    "vllm_xargs": _ENGINE,
    "watermarking": _OUTPUT,
    "web_search_options": "this server searches nothing",
}


class TextPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: Text


class Message(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a chat; roles as OpenAI writes them."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], msgspec.Meta(min_length=1, max_length=256)]
    name: Annotated[str, msgspec.Meta(max_length=64)] | None = None
    refusal: None = None


class JsonSchema(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    name: Annotated[str, msgspec.Meta(max_length=64)]
    schema: dict[str, Any]
    description: Annotated[str, msgspec.Meta(max_length=1_024)] | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    include_usage: bool = False


class _Sampling(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, kw_only=True):
    """What chat and completion requests share."""

    model: Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
    frequency_penalty: Penalty | None = None
    logit_bias: LogitBias | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    min_p: Unit | None = None
    min_tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    presence_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, msgspec.Meta(gt=0.0, le=10.0)] | None = None
    response_format: ResponseFormat | None = None
    seed: Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], msgspec.Meta(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, msgspec.Meta(ge=0.0, le=2.0)] | None = None
    top_k: Annotated[int, msgspec.Meta(ge=-1, le=1 << 20)] | None = None
    top_p: Annotated[float, msgspec.Meta(gt=0.0, le=1.0)] | None = None

    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    user: str | None = None


class ChatRequest(_Sampling, kw_only=True):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], msgspec.Meta(min_length=1)]
    logprobs: bool | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None


class CompletionRequest(_Sampling, kw_only=True):
    """`POST /v1/completions`; one prompt a request."""

    prompt: Text | Annotated[list[TokenId], msgspec.Meta(min_length=1, max_length=1 << 18)]
    logprobs: Annotated[int, msgspec.Meta(ge=0, le=5)] | None = None


Request = ChatRequest | CompletionRequest


@dataclass(frozen=True, slots=True)
class Checked:
    """A request that may go to an engine."""

    model: str
    stream: bool
    wants_usage: bool
    limits_itself: bool
    request: Request

    def upstream_body(self, *, model: str, cache_salt: str, request_id: str, context_length: int) -> bytes:
        """The engine's body: the checked fields, and those that only the gateway sets (all of safe characters).

        Raises:
            ContextLengthExceeded: the client's own max_tokens is more than the model's context holds.
        """
        self.request.model = model
        if self.request.max_tokens is None or self.request.max_tokens > context_length:
            if self.limits_itself:
                raise ContextLengthExceeded(
                    f"max_tokens is above the model's context length of {context_length} tokens.", param="max_tokens"
                )
            self.request.max_tokens = context_length
        own = f'{{"cache_salt":"{cache_salt}","request_id":"{request_id}",'.encode()
        return own + _ENCODER.encode(self.request)[1:]


_ENCODER: Final = msgspec.json.Encoder()
_UNKNOWN_FIELD: Final = re.compile(r"unknown field `([^`]{1,64})`(?: - at `([^`]+)`)?")
_PLACE: Final = re.compile(r" - at (?:`key` in )?`([^`]+)`$")


class RequestPolicy:
    """Checks bodies against bounds; one instance per endpoint."""

    def __init__(
        self,
        kind: type[ChatRequest] | type[CompletionRequest],
        *,
        max_messages: int,
        max_output_tokens: int,
        max_choices: int,
        max_schema_bytes: int,
    ) -> None:
        self._decoder: msgspec.json.Decoder[Request] = msgspec.json.Decoder(kind)
        self._max_messages = max_messages
        self._max_output_tokens = max_output_tokens
        self._max_choices = max_choices
        self._max_schema_bytes = max_schema_bytes

    def check(self, body: bytes) -> Checked:
        """Decode and bound a client's body.

        Raises:
            RequestInvalid: names the field, the rule and, for a refused field, the reason.
        """
        try:
            request = self._decoder.decode(body)
        except msgspec.ValidationError as error:
            raise _invalid(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestInvalid(f"The body is not JSON: {error}.", code="invalid_json") from None
        stream = bool(request.stream)
        wants_usage = bool(request.stream_options and request.stream_options.include_usage)
        if request.stream_options is not None and not stream:
            raise RequestInvalid("stream_options goes with stream: true.", param="stream_options")
        if isinstance(request, ChatRequest):
            self._check_chat(request)
        limits_itself = request.max_tokens is not None
        self._check_lengths(request)
        if request.response_format is not None:
            self._check_format(request.response_format)
        for name in IGNORED:
            setattr(request, name, None)
        if stream:
            request.stream_options = StreamOptions(include_usage=True)  # settled by it, shown only when asked for
        return Checked(request.model, stream, wants_usage, limits_itself, request)

    def _check_chat(self, request: ChatRequest) -> None:
        if len(request.messages) > self._max_messages:
            raise RequestInvalid(f"At most {self._max_messages} messages are read.", param="messages")
        if request.max_completion_tokens is not None:
            if request.max_tokens is not None:
                raise RequestInvalid("Send max_completion_tokens or max_tokens, not both.", param="max_tokens")
            request.max_tokens, request.max_completion_tokens = request.max_completion_tokens, None
        if request.top_logprobs and not request.logprobs:
            raise RequestInvalid("top_logprobs goes with logprobs: true.", param="top_logprobs")

    def _check_lengths(self, request: Request) -> None:
        if request.n is not None and request.n > self._max_choices:
            raise RequestInvalid(f"n may be at most {self._max_choices} on this server.", param="n")
        if request.max_tokens is None:
            # OpenAI's default of a plain completion is 16; a chat runs to the model's end, within our ceiling
            request.max_tokens = 16 if isinstance(request, CompletionRequest) else self._max_output_tokens
        elif request.max_tokens > self._max_output_tokens:
            raise RequestInvalid(
                f"max_tokens may be at most {self._max_output_tokens} on this server.", param="max_tokens"
            )
        alternatives = (request.top_logprobs if isinstance(request, ChatRequest) else request.logprobs) or 0
        if (request.n or 1) * request.max_tokens * (1 + alternatives) > MOST_ENTRIES:
            raise RequestInvalid(
                f"n × max_tokens × (1 + top_logprobs) may be at most {MOST_ENTRIES}: the answer would be too long.",
                param="max_tokens",
            )
        if request.min_tokens is not None and request.min_tokens > request.max_tokens:
            raise RequestInvalid("min_tokens is above max_tokens.", param="min_tokens")

    def _check_format(self, response_format: ResponseFormat) -> None:
        if (response_format.type == "json_schema") != (response_format.json_schema is not None):
            raise RequestInvalid("json_schema goes with type 'json_schema', and only with it.", param="response_format")
        if response_format.json_schema is None:
            return
        schema = response_format.json_schema.schema
        if len(msgspec.json.encode(schema)) > self._max_schema_bytes:
            raise RequestInvalid(f"A schema may have at most {self._max_schema_bytes} bytes.", param="response_format")
        _check_schema(schema, depth=0)


def _check_schema(node: object, *, depth: int) -> None:
    """Refuse what costs the engine's compiler dear: depth, long choices, patterns."""
    if depth > 16:
        raise RequestInvalid("A schema may be at most 16 levels deep.", param="response_format")
    if isinstance(node, dict):
        if isinstance(node.get("pattern"), str) or "patternProperties" in node:
            raise RequestInvalid("A schema may not hold regular expressions.", param="response_format")
        for value in node.values():
            _check_schema(value, depth=depth + 1)
    elif isinstance(node, list):
        if len(node) > 256:
            raise RequestInvalid("A list in a schema may have at most 256 items.", param="response_format")
        for value in node:
            _check_schema(value, depth=depth + 1)


def _invalid(text: str) -> RequestInvalid:
    """msgspec's sentence as ours: the same fact, with the field as `param`."""
    unknown = _UNKNOWN_FIELD.search(text)
    if unknown:
        name, place = unknown[1], _param(unknown[2] or "$")
        field = f"{place}.{name}" if place else name
        if name in GATEWAY_SET or name in REFUSED:
            reason = REFUSED.get(name, "only the gateway sets it")
            return RequestInvalid(f"{field} is not accepted: {reason}.", param=field, code="unsupported_parameter")
        return RequestInvalid(f"{field} is not a parameter of this call.", param=field, code="unknown_parameter")
    place_found = _PLACE.search(text)
    place = _param(place_found[1]) if place_found else None
    sentence = _PLACE.sub("", text)[:200]  # it may quote a field's name, which has no bound
    return RequestInvalid(f"{place or 'The body'}: {sentence}.", param=place)


def _param(place: str) -> str | None:
    """`$.messages[0].role` → `messages[0].role`; the root → None."""
    return place.removeprefix("$").removeprefix(".") or None
