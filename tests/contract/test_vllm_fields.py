"""Our classes of request fields against the request classes of the vLLM that is installed."""

import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
from msgspec import Struct
from msgspec.structs import fields

from gateway.dialects import (
    DIALECTS,
    OPT_IN,
    Bounds,
    Dialect,
    all_dialects,
    chat_shapes,
    counts,
    message_shapes,
    responses,
)
from gateway.dialects.chat import IGNORED as CHAT_IGNORED
from gateway.dialects.counts import AskedTokens
from gateway.dialects.dialect import with_fields
from gateway.dialects.fields import GATEWAY_SET
from gateway.dialects.responses import IGNORED as RESPONSES_IGNORED

Engines = dict[str, dict[str, set[str]]]
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
PLAIN = {"model": "m", "prompt": "x"}
ECHOES: tuple[dict[str, Any], ...] = (
    {},
    {"echo": False},
    {"echo": True},
    {"prompt_logprobs": 0},
    {"prompt_logprobs": 2},
)
SCORING: list[tuple[str, dict[str, Any]]] = [
    *(("/v1/chat/completions", {**CHAT, **asked, **more}) for asked in ({}, {"logprobs": True}) for more in ECHOES),
    *(("/v1/completions", {**PLAIN, **asked, **more}) for asked in ({}, {"logprobs": 0}) for more in ECHOES),
]
"""Requests, some of which ask for logprobs of their prompt."""
NOT_SENT = {
    "/v1/chat/completions": {*CHAT_IGNORED, "max_completion_tokens"},
    "/v1/completions": set(CHAT_IGNORED),
    "/v1/responses": {*RESPONSES_IGNORED} - {"store"},
    "/v1/messages": {"cache_control", "inference_geo", "metadata", "service_tier"},
    "/v1/messages/count_tokens": {"cache_control"},
}
"""What clients may send, and the engine does not see."""
OVERLAPS = {
    ("/v1/responses", "background"): {"taken", "refused"},  # taken where it is false
    ("/v1/responses/input_tokens", "background"): {"of responses", "refused"},
    ("/v1/messages", "thinking"): {"taken", "opt-in"},  # taken where it is disabled
    ("/v1/messages/count_tokens", "thinking"): {"taken", "opt-in"},
}
"""Fields that are in two classes, by their value."""

CHAT_PLACES = {
    "messages": {"author", "channel", "content_type", "recipient", "task", "tools"},
    "messages.content": {"audio_url", "image_pil", "image_url", "prompt_cache_breakpoint", "uuid", "video_url"},
    "tools": {"defer_loading"},
    "tools.function": {"defer_loading"},
}
RESPONSES_PLACES = {
    "input": {"created_by"},
    "input.content": {"prompt_cache_breakpoint"},
    "input.output": {"prompt_cache_breakpoint"},
    "reasoning": {"context", "generate_summary", "mode"},
    "tools": {"allowed_callers", "async", "defer_loading", "output_schema"},
}
MESSAGES_PLACES = {
    "messages.content": {"source", "tool", "tool_name"},
    "output_config": {"effort"},
    "system": {
        "content",
        "data",
        "id",
        "input",
        "is_error",
        "name",
        "signature",
        "source",
        "thinking",
        "tool",
        "tool_name",
        "tool_use_id",
    },
    "thinking": {"display"},
    "tools": {"defer_loading"},
}
NOT_TAKEN: dict[str, dict[str, set[str]]] = {
    "/v1/chat/completions": CHAT_PLACES,
    "/v1/tokenize": CHAT_PLACES,
    "/v1/responses": RESPONSES_PLACES,
    "/v1/responses/input_tokens": {place: names for place, names in RESPONSES_PLACES.items() if place != "reasoning"},
    "/v1/messages": MESSAGES_PLACES,
    "/v1/messages/count_tokens": MESSAGES_PLACES,
}
"""What an engine's class has at a place within the request, and no client may send there."""
MARKS = {"cache_control", "citations"}
NOT_SENT_WITHIN: dict[str, set[str]] = {
    "input": {"async_"},  # as vLLM spells `async` in a whole answer; null
    "input.output": {"annotations", "logprobs", "refusal"},  # of it the text alone is sent
    "messages": {"annotations", "reasoning_content"},  # empty; vLLM makes the other one `reasoning` before it looks
    "messages.content": MARKS,
    "messages.tool_calls": {"index"},
    "stream_options": {"include_obfuscation"},
    "system": MARKS,
    "tools": {"cache_control", "type"},
}
"""What clients may send at a place, and the engine does not see or does not name."""
WITHOUT_CLASS = {
    "cache_control",
    "chat_template_kwargs",  # a template's variables: any names
    "messages.content.cache_control",
    "messages.content.content",  # of a tool's result: blocks without a class
    "messages.content.content.cache_control",
    "metadata",
    "stream_options",
    "system.cache_control",
    "tools.cache_control",
}
"""Places of which the engine has no class: it takes any names there, or is sent none."""
LATER: dict[tuple[type[Struct], str], Any] = {
    (chat_shapes.System, "content"): chat_shapes.TextPart,
    (chat_shapes.Developer, "content"): chat_shapes.TextPart,
    (chat_shapes.User, "content"): chat_shapes.TextPart,
    (chat_shapes.ToolResult, "content"): chat_shapes.TextPart,
    (chat_shapes.Assistant, "content"): chat_shapes.TextPart | chat_shapes.RefusalPart,
    (chat_shapes.Assistant, "tool_calls"): chat_shapes.ToolCall,
    (responses.Asked, "input"): responses.Item,
    (responses.Item, "content"): responses.TextPart,
    (responses.Item, "output"): responses.TextPart,
    (message_shapes.User, "content"): message_shapes.TextBlock | message_shapes.ToolResult,
    (message_shapes.Assistant, "content"): message_shapes.TextBlock
    | message_shapes.ToolUse
    | message_shapes.Thought
    | message_shapes.HiddenThought,
    (message_shapes.System, "content"): message_shapes.TextBlock,
    (message_shapes.ToolResult, "content"): message_shapes.TextBlock,
    (message_shapes.Conversation, "system"): message_shapes.TextBlock,
}
"""Members that are first kept as they came, and what they are decoded into."""


def structs(kind: Any) -> list[type[Struct]]:
    if isinstance(kind, type):
        return [kind] if issubclass(kind, Struct) else []
    return [found for one in get_args(kind) for found in structs(one)]


def literals(kind: Any) -> set[str]:
    if get_origin(kind) is Literal:
        return {value for value in get_args(kind) if isinstance(value, str)}
    return {value for one in get_args(kind) for value in literals(one)}


@dataclass
class Place:
    """What may be in a request's object: its members, and the `type` and `role` by which the engine tells it apart."""

    names: set[str] = field(default_factory=set)
    tags: set[str] = field(default_factory=set)


def places_of(kind: Any, place: str = "", found: dict[str, Place] | None = None) -> dict[str, Place]:
    """By where they are: "" is the request, "tools.function" what is in its tools."""
    found = {} if found is None else found
    for struct in structs(kind):
        here, config = found.setdefault(place, Place()), struct.__struct_config__
        if config.tag_field is not None:
            here.names.add(config.tag_field)
            here.tags.add(str(config.tag))
        hints = get_type_hints(struct, include_extras=True)
        for name, encoded in zip(struct.__struct_fields__, struct.__struct_encode_fields__, strict=True):
            here.names.add(encoded)
            if encoded in ("type", "role"):
                here.tags |= literals(hints[name])
            later = next((LATER[base, name] for base in struct.__mro__ if (base, name) in LATER), hints[name])
            places_of(later, f"{place}.{encoded}".removeprefix("."), found)
    return found


def places(kind: type[Dialect]) -> dict[str, Place]:
    return places_of(with_fields(kind.request, sorted(kind.opt_in)))


@pytest.fixture(scope="module")
def told() -> Any:
    tags = {kind.path: {place: sorted(here.tags) for place, here in places(kind).items()} for kind in DIALECTS}
    asked = {"tags": tags, "requests": SCORING}
    command = [sys.executable, str(Path(__file__).with_name("vllm_fields.py")), json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def engines(told: Any) -> Engines:
    """Members by path and place."""
    return {path: {place: set(names) for place, names in found.items()} for path, found in told["fields"].items()}


def taken(kind: type[Dialect]) -> set[str]:
    return {each.name for each in fields(kind.request)} - GATEWAY_SET


def classes(kind: type[Dialect]) -> dict[str, set[str]]:
    """Which fields are in which class."""
    found = {
        "taken": taken(kind),
        "opt-in": set(kind.opt_in),
        "gateway": set(GATEWAY_SET),
        "refused": set(kind.refused),
    }
    if kind is counts.InputTokens:  # what is left of a whole request is unknown to its count
        found["of responses"] = (taken(responses.Responses) | responses.Responses.opt_in) - taken(kind)
    return found


@pytest.mark.parametrize("kind", DIALECTS, ids=lambda kind: kind.path)
def test_every_field_of_the_engine_is_in_exactly_one_class(kind: type[Dialect], engines: Engines) -> None:
    """Taken within bounds, the operator's to allow, the gateway's, or refused with a reason: a new one fails here.

    So is every field of ours. Those that are in two, by their value, are named.
    """
    by_class = classes(kind)
    names = set(engines[kind.path][""]).union(*by_class.values())
    found = {name: {of for of, has in by_class.items() if name in has} for name in names}
    several = {(kind.path, name): of for name, of in found.items() if len(of) != 1}
    assert several == {place: of for place, of in OVERLAPS.items() if place[0] == kind.path}


@pytest.mark.parametrize("kind", DIALECTS, ids=lambda kind: kind.path)
def test_nothing_is_passed_that_the_engine_does_not_know(kind: type[Dialect], engines: Engines) -> None:
    """vLLM takes unknown fields in silence: one of ours that it lost would do nothing."""
    assert taken(kind) - NOT_SENT.get(kind.path, set()) <= engines[kind.path][""]
    assert kind.opt_in <= engines[kind.path][""]


@pytest.mark.parametrize("kind", DIALECTS, ids=lambda kind: kind.path)
def test_what_is_within_a_request_is_what_the_engine_takes_there(kind: type[Dialect], engines: Engines) -> None:
    """Tools, formats, messages and their parts: a member that the engine has lost fails here, and so does a new one."""
    ours, theirs = places(kind), engines[kind.path]
    within = ours.keys() - {""} - WITHOUT_CLASS
    assert within <= theirs.keys()
    unknown = {place: ours[place].names - theirs[place] - NOT_SENT_WITHIN.get(place, set()) for place in within}
    assert {place: names for place, names in unknown.items() if names} == {}
    left = {place: theirs[place] - ours[place].names for place in within}
    assert {place: names for place, names in left.items() if names} == NOT_TAKEN.get(kind.path, {})


def test_what_a_count_is_made_of_is_what_the_engine_takes(engines: Engines) -> None:
    """The tokens of a response are asked of vLLM's tokenize, in a chat's words."""
    theirs = engines["/v1/tokenize"]
    for place, here in places_of(AskedTokens).items():
        assert here.names <= theirs[place] | NOT_SENT_WITHIN.get(place, set()), place


def test_every_opt_in_field_belongs_to_a_dialect() -> None:
    """What `TAILOR_ALLOWED_FIELDS` may name does something somewhere."""
    assert set().union(*(kind.opt_in for kind in DIALECTS)) == set(OPT_IN)


def test_it_is_known_which_requests_ask_for_logprobs_of_the_prompt(told: Any) -> None:
    """Each of them, and no other: they must not come to an engine on a CPU."""
    dialects = all_dialects(Bounds(allowed_fields=frozenset(OPT_IN)))
    found = [bool(dialects[path].check(json.dumps(body).encode()).scores_prompt) for path, body in SCORING]
    assert found == told["scored"]
    assert set(found) == {True, False}
