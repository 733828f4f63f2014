"""One endpoint's dialect: how its requests are checked, and how what the engine answers is told to the client.

    check(body) → Checked → upstream_body(…)          the client's words → the engine's
    whole(…), stream(…) → Usage                       the engine's → the client's
    refusal(…), error(…), error_event(…)              what went wrong, as this dialect's clients read it

The upstream body is built from what was checked, never forwarded. The engine's name for an adapter, and its own error
texts, never reach a client.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Final, Protocol

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType
from mypy_extensions import mypyc_attr

from gateway.dialects.conversation import beginning
from gateway.dialects.fields import GATEWAY_SET, OPT_IN, REFUSED, EngineError, EngineRefusal
from gateway.dialects.lists import ListDecoder
from gateway.dialects.schemas import SchemaBudget
from gateway.dialects.words import MOST_VALUES, Pieces, decoded, hold_values, is_null
from gateway.errors import ContextLengthExceeded, ErrorAnswer, GatewayError, ReplicaFailed, RequestInvalid, answer
from gateway.tokens import Usage

ENCODER: Final = msgspec.json.Encoder()
MOST_ENTRIES: Final = 131_072
"""Tokens with their alternatives in one answer: about 10 MB of JSON."""
MOST_TOOLS: Final = 128
TOOLS_BYTES: Final = 131_072
REST_BYTES: Final = 65_536
LARGE: Final = ("messages", "prompt", "input", "system", "instructions", "tools")
"""Fields that may be larger than `REST_BYTES`, of any dialect."""
STAND_INS: Final = {"messages": b'[{"role":"user","content":""}]', "prompt": b'""', "input": b'""'}
"""What a large prompt is while the other fields are decoded: so that it is read once less."""
LENGTHS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""What engines call the ceiling of an answer."""
TOKEN_IDS: Final = ("allowed_token_ids", "logit_bias", "prompt", "stop_token_ids")
"""Fields that may hold ids of tokens."""
BYTES_PER_TOKEN: Final = 4
NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the operator allows. `calls_tools`: the engine reads tool calls out of free text (`tool_choice` auto)."""

    max_messages: int = 1_024
    max_output_tokens: int = 4_096
    max_choices: int = 4
    max_schema_bytes: int = 16_384
    calls_tools: bool = False
    allowed_fields: frozenset[str] = frozenset()


class Stream(Protocol):
    """A stream of server-sent events on its way to the client."""

    finished: bool
    """Whether the dialect's last event has passed: one that ends without has been broken off."""
    opening: bytes
    """Events, translated, that the API server wrote before its engine gave anything: they go before the first that
    `feed` gives, so that an answer begins with the engine's own output."""

    def feed(self, data: bytes) -> bytes:
        """The whole events that are there now, translated; a half one waits for the next call.

        Raises:
            ReplicaFailed: the engine reported an error inside the stream, or an event grew past all bounds.
        """

    @property
    def usage(self) -> Usage | None:
        """Tokens so far; None before the engine has said anything."""

    @property
    def is_counted(self) -> bool:
        """Whether `usage` is the engine's own count to the last token; else it is an estimate."""


class Checked:
    """A request that may go to an engine."""

    __slots__ = (
        "affinity", "choices", "highest_ids", "length", "length_field", "length_param", "model", "own", "own_length",
        "prompt_bytes", "prompt_tokens", "request", "scores_prompt", "stream", "wants_usage",
    )  # fmt: skip

    def __init__(  # a dataclass's own would stay interpreted
        self,
        *,
        model: str,
        stream: bool,
        request: Any,
        length_field: str,
        length_param: str,
        length: int,
        own_length: bool,
        choices: int,
        prompt_bytes: int,
        affinity: str | None,
        wants_usage: bool = False,
        own: Mapping[str, Any] = NOTHING,
        prompt_tokens: int | None = None,
        scores_prompt: str = "",
        highest_ids: Mapping[str, int] | None = None,
    ) -> None:
        self.model = model
        self.stream = stream
        self.request = request
        """The checked fields, a `Struct` in the engine's words; its `model` and its length are set for each replica."""
        self.length_field = length_field
        """What the engine calls the ceiling of one answer; "" where nothing is generated."""
        self.length_param = length_param
        """What the client called it."""
        self.length = length
        """Ceiling of one answer, in tokens."""
        self.own_length = own_length
        """Whether the client asked for it: then it is never cut in silence."""
        self.choices = choices
        self.prompt_bytes = prompt_bytes
        """No less than the prompt's length."""
        self.prompt_tokens = prompt_bytes // BYTES_PER_TOKEN if prompt_tokens is None else prompt_tokens
        """How many there are, where the prompt is token ids; else what is estimated."""
        self.affinity = affinity
        """What the client says its requests have in common (`prompt_cache_key`, `user`), for sticky routing."""
        self.wants_usage = wants_usage
        self.scores_prompt = scores_prompt
        """The field by which logprobs of the prompt are asked for, "" where they are not: no engine on a CPU may be."""
        self.own = own
        """What the answer tells the client of its own request (metadata), where the dialect does."""
        self.highest_ids = highest_ids
        """Of the fields that name tokens the highest id in each; None where there are none."""

    @property
    def max_tokens(self) -> int:
        """Most tokens that all answers together may have."""
        return self.length * self.choices

    def common(self) -> bytes:
        """What requests of one user, or else of one conversation, have in common."""
        if self.affinity is not None:
            return self.affinity.encode("utf-8", "surrogatepass")
        return beginning(self.request)

    def prompt_scores_refused(self) -> RequestInvalid:
        """The error of one that asks for `scores_prompt` on a CPU, where vLLM 0.32 may end of it for all."""
        return RequestInvalid(
            f"{self.scores_prompt} is not accepted: it asks for logprobs of the prompt, which this server's engine "
            "cannot give on a CPU.",
            param=self.scores_prompt,
            code="unsupported_parameter",
        )

    def limit_output(self, most: int | None) -> None:
        """Hold the plan's ceiling of one answer.

        Raises:
            RequestInvalid: the client asked for more.
        """
        if most is None or self.length <= most:
            return
        if self.own_length:
            raise RequestInvalid(f"{self.length_param} may be at most {most} on your plan.", param=self.length_param)
        self.length = most

    def hold_ids(self, vocabulary: int) -> None:
        """Hold the ids of tokens to a model's vocabulary, of so many.

        The engine would too, but vLLM 0.32 begins to stream before it looks, and a response's stream then breaks off.

        Raises:
            RequestInvalid: one is not in it.
        """
        for field, highest in (self.highest_ids or NOTHING).items():
            if highest >= vocabulary:
                raise RequestInvalid(_unknown_token(field), param=field)

    def upstream_body(self, *, model: str, cache_salt: str, context_length: int) -> bytes:
        """The engine's body: the checked fields, and those that only the gateway sets (all of safe characters).

        May be called again for another replica.

        Raises:
            ContextLengthExceeded: the client's own ceiling is more than the model's context holds.
        """
        self.request.model = model
        if not self.length_field:
            return ENCODER.encode(self.request)
        if self.length > context_length and self.own_length:
            raise ContextLengthExceeded(
                f"{self.length_param} is above the model's context length of {context_length} tokens.",
                param=self.length_param,
            )
        setattr(self.request, self.length_field, min(self.length, context_length))
        return b'{"cache_salt":"%b",%b' % (cache_salt.encode(), ENCODER.encode(self.request)[1:])


@mypyc_attr(allow_interpreted_subclasses=True)
class Dialect:
    """OpenAI's ways where an endpoint has none of its own."""

    path: ClassVar[str]
    upstream_path: ClassVar[str]
    prompt_param: ClassVar[str]
    generates: ClassVar[bool] = True
    """False for endpoints that only count: no token is generated, any model name of the engine does."""
    request: ClassVar[type[Struct]]
    message: ClassVar[Any] = Raw
    """What a list of `messages` holds."""
    refused: ClassVar[Mapping[str, str]] = REFUSED
    opt_in: ClassVar[frozenset[str]] = frozenset()
    most_values: ClassVar[int] = MOST_VALUES
    hints: ClassVar[Mapping[str, str]] = {}
    """Why the last member of a faulty place is faulty, where msgspec's sentence does not tell."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        allowed = sorted(self.opt_in & bounds.allowed_fields)
        request = with_fields(self.request, allowed) if allowed else self.request
        self.opted_in = frozenset(allowed)
        self._decoder = msgspec.json.Decoder(request)
        self._members = request.__struct_encode_fields__
        self._whole = msgspec.json.Decoder(undecoded(self._members))
        self._messages = ListDecoder(self.message, least=1, most=bounds.max_messages)

    # the client's words → the engine's

    def check(self, body: bytes) -> Checked:
        """Decode and bound a client's body.

        Raises:
            RequestInvalid: names the field, the rule and, for a refused field, the reason.
        """
        try:
            if not body.isascii():
                body.decode()  # text that is kept as it came must be UTF-8 too
            request = self._decoder.decode(body) if len(body) <= REST_BYTES else self._in_parts(body)
        except msgspec.ValidationError as error:
            raise self.invalid(str(error)) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RequestInvalid(f"The body is not JSON: {error}.", code="invalid_json") from None
        return self.bound(request, len(body), Pieces(self.invalid, body))

    def bound(self, request: Any, size: int, pieces: Pieces) -> Checked:
        """What no type can say; makes the request the engine's. `size`: of the body, in bytes.

        Raises:
            RequestInvalid: a bound is passed.
        """
        raise NotImplementedError

    def _in_parts(self, body: bytes) -> Any:
        """A large request: what would be slow to decode only to be refused is not decoded.

        Raises:
            RequestInvalid: too many values or messages; tools, or what is neither tools nor prompt, is too large.
            msgspec.DecodeError: as the whole body's.
        """
        hold_values(body, self.most_values)
        whole = self._whole.decode(body)
        rest = len(body)
        members: list[bytes] = []
        prompts: list[tuple[str, Raw]] = []
        for name in self._members:
            value: Any = getattr(whole, name)
            if not isinstance(value, Raw):
                continue
            if name == "tools" and len(value) > TOOLS_BYTES:
                raise RequestInvalid(f"tools may have at most {TOOLS_BYTES} bytes.", param="tools")
            if name in LARGE:
                rest -= len(value)
            stand_in = STAND_INS.get(name)
            if stand_in is not None and not is_null(value):
                prompts.append((name, value))
                members.append(b'"%b":%b' % (name.encode(), stand_in))
            else:
                members.append(b'"%b":%b' % (name.encode(), value))
        if rest > REST_BYTES:
            raise RequestInvalid(f"All but the prompt and the tools may have at most {REST_BYTES} bytes.")
        request = self._decoder.decode(b"{%b}" % b",".join(members))
        for name, value in prompts:
            setattr(request, name, value if name != "messages" else self._read_messages(value))
        return request

    def _read_messages(self, given: Raw) -> Any:
        return decoded(self._messages, given, "messages", self.invalid)

    def hold_number(self, messages: Sequence[Any]) -> None:
        """Raises RequestInvalid where they are too many."""
        if len(messages) > self.bounds.max_messages:
            raise RequestInvalid(f"At most {self.bounds.max_messages} messages are read.", param="messages")

    def schemas(self) -> SchemaBudget:
        return SchemaBudget(self.bounds.max_schema_bytes)

    def length(self, asked: int | None, param: str, default: int | None = None) -> int:
        """The ceiling of one answer.

        Raises:
            RequestInvalid: more than this server gives.
        """
        most = self.bounds.max_output_tokens
        if asked is None:
            return min(default or most, most)
        if asked > most:
            raise RequestInvalid(f"{param} may be at most {most} on this server.", param=param)
        return asked

    # the engine's words → the client's

    def stream(self, engine_name: str, checked: Checked) -> Stream:
        """For an answer in pieces."""
        raise NotImplementedError

    def whole(self, engine_name: str, checked: Checked, body: bytes) -> tuple[bytes, Usage]:
        """A complete answer, and what it used.

        Raises:
            ReplicaFailed: it is not what the engine answers.
        """
        raise NotImplementedError

    def refusal(self, status: int, body: bytes, checked: Checked) -> GatewayError:
        """The engine's refusal in our words: its own text may name paths and inner names, so none is passed on.

        Of what it says only the name of a field is, and only where the client sent that field.
        """
        error = read_error(body)
        text = error.message
        if status == 400 and ("context length" in text or "max_model_len" in text):
            return ContextLengthExceeded(
                "The prompt is longer than the model's context (or leaves no room for the answer): shorten it.",
                param=self.prompt_param,
            )
        if status in (400, 422):
            param = self._refused_field(error, checked)
            if param is not None:
                return RequestInvalid(_why_refused(param, text), param=param)
            return RequestInvalid(
                "The engine cannot do what was asked: check prompt, tools, response format and sampling parameters."
            )
        return ReplicaFailed("The engine failed on this request; try again.")

    def refusal_in_stream(self, body: bytes, checked: Checked) -> GatewayError | None:
        """What a stream's first event refuses the request with, as `refusal` tells it; None where the engine failed.

        vLLM 0.32 looks at ids of tokens, among others, when it has answered a stream's request with 200 already.
        """
        code = read_error(body).code
        return self.refusal(code, body, checked) if isinstance(code, int) and code in (400, 422) else None

    def _refused_field(self, error: EngineError, checked: Checked) -> str | None:
        """The field that the engine refuses, as the client calls it; None where it names none that the client sent."""
        told = error.param
        if told is None:  # vLLM 0.32 has a name for most fields, and none for these
            told = "prompt" if _UNKNOWN_TOKEN.match(error.message) else "n" if _GREEDY.match(error.message) else ""
        field = told.partition(".")[0]
        if field in LENGTHS:
            return checked.length_param if checked.own_length else None
        if field not in self._members:
            return None
        sent: Any = getattr(checked.request, field, None)
        return None if sent is None or sent is UNSET else field

    def error(self, error: Exception, request_id: str) -> ErrorAnswer:
        """A whole answer that tells of an error."""
        return answer(error)

    def error_event(self, error: Exception, request_id: str) -> bytes:
        """The last event of a stream that failed; no end mark follows, so that no client takes it for whole."""
        return b"data: " + self.error(error, request_id).body + b"\n\n"

    def invalid(self, text: str, within: str = "") -> RequestInvalid:
        """msgspec's sentence as ours: the same fact, with the field (below `within`) as `param`."""
        text = cut(text)
        unknown = _UNKNOWN_FIELD.search(text)
        if unknown:
            return self._unknown(unknown[1], _param(within, unknown[2] or "$"))
        place_found = _PLACE.search(text)
        place = _param(within, place_found[1] if place_found else "$")
        sentence = _PLACE.sub("", text)[:200]  # it may quote a field's name, which has no bound
        missing = _MISSING.search(sentence)
        if missing:
            param = f"{place}.{missing[1]}" if place else missing[1]
            return RequestInvalid(f"{param} is missing.", param=param)
        kind = _NUMBER.sub("[]", place or "")
        hint = next((f" ({why})" for end, why in self.hints.items() if kind.endswith(end)), "")
        return RequestInvalid(f"{place or 'The body'}: {sentence}{hint}.", param=place)

    def _unknown(self, name: str, place: str | None) -> RequestInvalid:
        param = f"{place}.{name}" if place else name
        reason = None
        if place is None and name in GATEWAY_SET:
            reason = "only the gateway sets it"
        elif place is None and name in self.opt_in:
            reason = f"{OPT_IN[name][1]}; the operator has not allowed it"
        elif name in self.refused:
            reason = self.refused[name]
        if reason is None:
            return RequestInvalid(f"{param} is not a parameter of this call.", param=param, code="unknown_parameter")
        return RequestInvalid(f"{param} is not accepted: {reason}.", param=param, code="unsupported_parameter")


def read_error(body: bytes) -> EngineError:
    """What the engine says; to be looked at, never passed on."""
    try:
        return msgspec.json.decode(body, type=EngineRefusal).error
    except (msgspec.DecodeError, UnicodeDecodeError):
        return EngineError()


def cut(sentence: str) -> str:
    """Beginning and end of a sentence of msgspec's: it quotes what the client sent, and is read several times."""
    return sentence if len(sentence) <= 700 else f"{sentence[:200]}…{sentence[-500:]}"


def _why_refused(param: str, text: str) -> str:
    """`text`: the engine's, of which nothing is quoted."""
    if param in TOKEN_IDS and "vocab" in text:
        return _unknown_token(param)
    if param == "n" and _GREEDY.match(text):
        return "n is above 1 and temperature is 0, where all answers are the same: ask for one, or set a temperature."
    return f"The engine cannot do what {param} asks for: check its value."


def _unknown_token(param: str) -> str:
    return f"{param} has a token id that is not in the base model's vocabulary."


_UNKNOWN_TOKEN: Final = re.compile(r"Token id -?\d+ is out of vocabulary")
_GREEDY: Final = re.compile(r"n must be 1 when using greedy sampling")
_UNKNOWN_FIELD: Final = re.compile(r"^Object contains unknown field `([^`]{1,64})`(?: - at `([^`]+)`)?")
_MISSING: Final = re.compile(r"^Object missing required field `([^`]+)`")
_NUMBER: Final = re.compile(r"\[[^\]]*\]")
_PLACE: Final = re.compile(r" - at (?:`key` in )?`([^`]+)`$")


def _param(within: str, place: str) -> str | None:
    """`$.messages[0].role` → `messages[0].role`; the root → None."""
    return (within + place.removeprefix("$")).removeprefix(".") or None


def undecoded(names: tuple[str, ...]) -> type[Struct]:
    """A type of those members, each as the JSON that it is."""
    fields = [(name, Raw | UnsetType, UNSET) for name in names]
    return msgspec.defstruct("Undecoded", fields, forbid_unknown_fields=True)


def with_fields(request: type[Struct], names: list[str]) -> type[Struct]:
    """The request class with opt-in fields, each absent unless sent."""
    fields = [(name, OPT_IN[name][0] | msgspec.UnsetType, msgspec.UNSET) for name in names]
    return msgspec.defstruct(
        request.__name__, fields, bases=(request,), kw_only=True, forbid_unknown_fields=True, omit_defaults=True
    )


def highest_ids(bias: Mapping[str, float] | None, stops: Sequence[int] | None) -> Mapping[str, int] | None:
    """The highest token id of each field that names some; None where none does.

    Raises:
        RequestInvalid: a key of the bias is no token id.
    """
    if not bias and not stops:
        return None
    found: dict[str, int] = {}
    if bias:
        if not all(map(str.isdecimal, bias)):
            raise RequestInvalid("logit_bias maps token ids, written as numbers, to biases.", param="logit_bias")
        found["logit_bias"] = max(map(int, bias))
    if stops:
        found["stop_token_ids"] = max(stops)
    return found


def check_entries(choices: int, length: int, alternatives: int, param: str) -> None:
    """Hold an answer's size.

    Raises:
        RequestInvalid: choices × tokens × alternatives is too much.
    """
    if choices * length * (1 + alternatives) > MOST_ENTRIES:
        raise RequestInvalid(
            f"n × {param} × (1 + top_logprobs) may be at most {MOST_ENTRIES}: the answer would be too long.",
            param=param,
        )
