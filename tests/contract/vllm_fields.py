"""The members of requests, as the installed vLLM takes them; run in a process of its own, for importing vLLM warns.

Reads `{"tags": {path: {place: tags}}, "requests": [[path, body], …]}` from its first argument and prints one line:

    fields    {path: {place: members}}; "" is the request itself, "tools.function" what is in its tools
    scored    for each of the requests, whether it asks for logprobs of its prompt

Of several shapes that a value may have, those count whose `type` (or else `role`) is among the place's tags.
"""

import json
import sys
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import typing_extensions
from pydantic import BaseModel
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.tokenize.protocol import TokenizeChatRequest, TokenizeCompletionRequest

REQUESTS: Final[dict[str, tuple[type[BaseModel], ...]]] = {
    "/v1/chat/completions": (ChatCompletionRequest,),
    "/v1/completions": (CompletionRequest,),
    "/v1/responses": (ResponsesRequest,),
    "/v1/messages": (AnthropicMessagesRequest,),
    "/v1/messages/count_tokens": (AnthropicCountTokensRequest,),
    "/v1/responses/input_tokens": (ResponsesRequest,),  # whose prompt it counts
    "/v1/tokenize": (TokenizeChatRequest, TokenizeCompletionRequest),
}
WRAPPERS: Final = (
    Annotated,
    typing.Required,
    typing.NotRequired,
    typing_extensions.Required,
    typing_extensions.NotRequired,
)
SEVERAL: Final = (Union, types.UnionType, list, tuple, Iterable, Sequence)


def shapes(kind: Any) -> Iterator[dict[str, Any]]:
    """Those that a value of this type may have: members and their types."""
    origin = get_origin(kind)
    if origin in WRAPPERS:
        yield from shapes(get_args(kind)[0])
    elif origin in SEVERAL:
        for one in get_args(kind):
            yield from shapes(one)
    elif isinstance(kind, typing_extensions.TypeAliasType):
        yield from shapes(kind.__value__)
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        yield {field.alias or name: field.annotation for name, field in kind.model_fields.items()}
    elif typing_extensions.is_typeddict(kind):
        yield typing.get_type_hints(kind, include_extras=True)


def literals(kind: Any) -> set[str]:
    if get_origin(kind) is Literal:
        return {value for value in get_args(kind) if isinstance(value, str)}
    return {value for one in get_args(kind) for value in literals(one)}


def is_meant(shape: Mapping[str, Any], tags: set[str]) -> bool:
    own = literals(shape.get("type")) or literals(shape.get("role"))
    return not own or not tags or bool(own & tags)


def collect(kind: Any, place: str, tags: Mapping[str, Sequence[str]], found: dict[str, set[str]]) -> None:
    for shape in shapes(kind):
        if is_meant(shape, set(tags[place])):
            found.setdefault(place, set()).update(shape)
            for name, member in shape.items():
                below = f"{place}.{name}".removeprefix(".")
                if below in tags:
                    collect(member, below, tags, found)


def main() -> None:
    asked = json.loads(sys.argv[1])
    fields: dict[str, dict[str, list[str]]] = {}
    for path, kinds in REQUESTS.items():
        found: dict[str, set[str]] = {}
        for kind in kinds:
            collect(kind, "", asked["tags"][path], found)
        fields[path] = {place: sorted(names) for place, names in found.items()}
    scored = [
        REQUESTS[path][0](**body).to_sampling_params(4, {}).prompt_logprobs is not None  # type: ignore[attr-defined]
        for path, body in asked["requests"]
    ]
    sys.stdout.write(json.dumps({"fields": fields, "scored": scored}) + "\n")


if __name__ == "__main__":
    main()
