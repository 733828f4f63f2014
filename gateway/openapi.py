"""The gateway's API as an OpenAPI document: FastAPI's own for the control routes, the dialects' types for the hot ones.

No route serves it: strangers would read the operators' routes there, and `tailor openapi` writes it without a running
server or a base model. Fields that only an operator's setting allows (`TAILOR_ALLOWED_FIELDS`) are not in it.
"""

import json
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from importlib.metadata import version
from typing import Annotated, Any, Final

import msgspec
from fastapi.openapi.utils import get_openapi
from msgspec import Meta, Struct
from starlette.routing import BaseRoute

from adapter_store.bundle import BUNDLE_FILES
from gateway.dialects import DIALECTS, Dialect, chat_shapes, counts, message_shapes, responses
from gateway.dialects.dialect import MOST_TOOLS
from gateway.dialects.fields import Text, TokenId
from gateway.errors import Envelope, InvalidFileEnvelope, NotServableEnvelope, RejectedEnvelope
from gateway.front import FILES_PATH, OPEN_PATHS, UPLOAD_PATH

Json = dict[str, Any]
TITLE: Final = "Tailor"
JSON: Final = "application/json"
ANTHROPIC: Final = "/v1/messages"
_SCHEMAS: Final = "#/components/schemas/"
_MODULES: Final = "gateway.dialects."  # before the names of types that several dialects have
_Object = dict[str, Any]

_Parts = Annotated[list[chat_shapes.TextPart], Meta(min_length=1, max_length=chat_shapes.MOST_PARTS)]
_AnswerParts = Annotated[
    list[chat_shapes.TextPart | chat_shapes.RefusalPart], Meta(min_length=1, max_length=chat_shapes.MOST_PARTS)
]
_Calls = Annotated[list[chat_shapes.ToolCall], Meta(max_length=MOST_TOOLS)]
_Blocks = Annotated[list[message_shapes.TextBlock], Meta(max_length=message_shapes.MOST_BLOCKS)]
_Told = Annotated[
    list[message_shapes.TextBlock | message_shapes.ToolResult],
    Meta(min_length=1, max_length=message_shapes.MOST_BLOCKS),
]
_Answered = Annotated[
    list[message_shapes.TextBlock | message_shapes.ToolUse | message_shapes.Thought | message_shapes.HiddenThought],
    Meta(max_length=message_shapes.MOST_BLOCKS),
]
_ItemParts = Annotated[list[responses.TextPart], Meta(max_length=responses.MOST_PARTS)]

SHOWN: Final[tuple[tuple[type[Struct], str, Any], ...]] = (
    (chat_shapes.System, "content", Text | _Parts),
    (chat_shapes.Developer, "content", Text | _Parts),
    (chat_shapes.User, "content", Text | _Parts),
    (chat_shapes.ToolResult, "content", Text | _Parts),
    (chat_shapes.Assistant, "content", Text | _AnswerParts | None),
    (chat_shapes.Assistant, "tool_calls", _Calls | None),
    *((chat_shapes.Assistant, name, Text | None) for name in ("reasoning", "reasoning_content", "refusal")),
    (chat_shapes.CalledFunction, "arguments", Text),
    (chat_shapes.TextPart, "text", Text),
    (chat_shapes.RefusalPart, "refusal", Text),
    (chat_shapes.Function, "parameters", _Object | None),
    (chat_shapes.JsonSchema, "schema", _Object),
    (chat_shapes.CompletionRequest, "prompt", Text | list[TokenId]),
    (counts.TokenizeRequest, "prompt", Text),
    (message_shapes.User, "content", Text | _Told),
    (message_shapes.Assistant, "content", Text | _Answered),
    (message_shapes.System, "content", Text | _Blocks),
    (message_shapes.TextBlock, "text", Text),
    (message_shapes.ToolResult, "content", Text | _Blocks | None),
    (message_shapes.ToolUse, "input", _Object),
    (message_shapes.Thought, "thinking", Text),
    (message_shapes.Thought, "signature", Text | None),
    (message_shapes.HiddenThought, "data", Text),
    (message_shapes.Tool, "input_schema", _Object),
    (message_shapes.OutputFormat, "schema", _Object),
    (message_shapes.Conversation, "system", Text | _Blocks | None),
    (message_shapes.MessagesRequest, "system", Text | _Blocks | None),
    (responses.TextPart, "text", Text),
    (responses.TextPart, "refusal", Text),
    (responses.TextPart, "annotations", list[Any]),
    (responses.Item, "arguments", Text),
    (responses.Item, "summary", list[Any]),
    (responses.Item, "encrypted_content", Text | None),
    (responses.Item, "content", Text | _ItemParts),
    (responses.Item, "output", Text | _ItemParts),
    (responses.Tool, "parameters", _Object | None),
    (responses.Format, "schema", _Object),
    *(
        (request, name, shown)
        for request in (responses.ResponsesRequest, counts.InputTokensRequest)
        for name, shown in (("input", Text | list[responses.Item]), ("instructions", Text | None))
    ),
)
"""What clients may send where a request's type has raw JSON, which is held later; a test finds those left out."""

RECEIPTS: Final = {
    "x-request-id": "The request's id: the client's own where that is of `[A-Za-z0-9._:-]{1,64}`, else a new one.",
    "x-tailor-adapter": "The adapter that answered; `-` for the base model.",
    "x-tailor-version": "Its version, `number; sha256=digest`; `base; sha256=fingerprint` for the base model.",
    "x-tailor-replica": "The replica that answered.",
    "x-tailor-fallback": "Only where the alias's declared fallback answered: which one.",
    "server-timing": "Wait for a turn (`queue`), for the adapter (`load`), and where that was (`adapter`).",
}
REQUEST_ID: Final = {
    "name": "x-request-id",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "pattern": "^[A-Za-z0-9._:-]{1,64}$"},
    "description": "Names the request in the answer and in the server's log.",
}


IMPORT_PATH: Final = "/admin/v1/tenants/{tenant}/adapters/{name}/import"
UPLOAD_IN_PARTS: Final = f"{UPLOAD_PATH}/{{name}}/uploads"
PUBLISHING: Final = (
    UPLOAD_PATH,
    f"{UPLOAD_PATH}/{{name}}/versions",
    UPLOAD_IN_PARTS,
    f"{UPLOAD_IN_PARTS}/{{upload}}/complete",
    IMPORT_PATH,
)
FILE_UPLOADS: Final = "/v1/uploads"
CHECKING: Final = (FILES_PATH, f"{FILE_UPLOADS}/{{upload_id}}/complete")
"""Where a training file is checked line by line."""
KEEPING: Final = (*CHECKING, FILE_UPLOADS)
ARRIVING: Final = (
    *(path for path in PUBLISHING if path != IMPORT_PATH),
    *KEEPING,
    f"{UPLOAD_PATH}/{{name}}/versions/{{number}}/scaled",
)
"""What counts as an upload that is under way, beside those whose bodies are streamed."""
JOBS: Final = "/v1/fine_tuning/jobs"
ONCE: Final = (JOBS, "/v1/fine_tuning/checkpoints/{checkpoint}/permissions")
IDEMPOTENCY_KEY: Final = {
    "name": "idempotency-key",
    "in": "header",
    "required": False,
    "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
    "description": "Sent again with the same key, a request has one effect and gets the same answer, for a day.",
}


def document() -> Json:
    """The whole API."""
    from gateway.app import ROUTERS

    return openapi([route for part in ROUTERS for route in part.router.routes], DIALECTS)


def openapi(routes: Sequence[BaseRoute], dialects: Iterable[type[Dialect]]) -> Json:
    """The document of these control routes and these generation endpoints."""
    control = get_openapi(title=TITLE, version=version("tailor"), summary=_SUMMARY, description=_ABOUT, routes=routes)
    schemas: Json = control["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own; ours are told in one envelope
        schemas.pop(name, None)
    schemas |= _error_schemas()
    paths: Json = control["paths"]
    for path, methods in paths.items():
        for method, operation in methods.items():
            _complete(path, method, operation)
    hot, components = _hot_paths(tuple(dialects))
    paths |= hot
    schemas |= components
    control["components"]["securitySchemes"] = _SECURITY
    control["tags"] = [{"name": name, "description": text} for name, text in _TAGS.items()]
    return control


# control routes


def _complete(path: str, method: str, operation: Json) -> None:
    """What FastAPI does not know: keys, errors, bodies that it does not read."""
    answers: Json = operation["responses"]
    answers.pop("422", None)
    if path not in OPEN_PATHS:
        _complete_guarded(path, method, operation, answers)
    elif path == "/ready":
        answers["503"] = {"description": "Not ready; the same object says why.", "content": _content({})}
    for told in answers.values():
        told.setdefault("headers", {})["x-request-id"] = _text_header(RECEIPTS["x-request-id"])


def _complete_guarded(path: str, method: str, operation: Json, answers: Json) -> None:
    operation["security"] = _KEYS
    statuses = {400, 401, 403, 404, 500, 503}
    if method != "get":
        statuses |= {408, 409, 413, 507}
    if path in _UPLOADS and method in ("post", "put"):
        operation["requestBody"] = _UPLOADS[path]
        statuses.add(429)
    if path in ARRIVING and method == "post":
        statuses.add(429)
    if path in PUBLISHING and method == "post":
        answers["422"] = _error(422, "RejectedError")
        if path != IMPORT_PATH:
            answers["201"]["headers"] = {"location": _text_header("The adapter's path.", required=False)}
            operation.setdefault("parameters", []).append(IDEMPOTENCY_KEY)
    if path in KEEPING and method == "post":
        answers["200"]["headers"] = {"location": _text_header("The file's path.", required=False)}
        operation.setdefault("parameters", []).append(IDEMPOTENCY_KEY)
    if path in ONCE and method == "post":
        answers["200"]["headers"] = {"location": _text_header("A job's path.", required=False)}
        operation.setdefault("parameters", []).append(IDEMPOTENCY_KEY)
        statuses.add(429)
    if path == f"{JOBS}/{{job}}/events":
        answers["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}  # with `?stream=true`
        statuses.add(429)
    if path == f"{JOBS}/{{job}}/resume":
        statuses.add(429)
    if path.endswith("/usage"):
        answers["200"]["content"]["text/csv"] = {"schema": {"type": "string"}}
        answers["200"]["headers"] = {
            "x-tailor-next-page": _text_header("In CSV only: what next_page is in JSON.", required=False)
        }
    answers |= {str(status): _error(status) for status in sorted(statuses)}
    if path in CHECKING and method == "post":
        answers["400"] = _error(400, "InvalidFileError")
    if path == JOBS and method == "post":
        answers["400"] = _error(400, "NotServableError")


# generation endpoints


def _hot_paths(dialects: tuple[type[Dialect], ...]) -> tuple[Json, Json]:
    """Their path items, and the schemas of their requests."""
    requests = [dialect.request for dialect in dialects]
    types = [*requests, *(struct for struct, _, _ in SHOWN), *(shown for _, _, shown in SHOWN)]
    found, components = msgspec.json.schema_components(types, ref_template=_SCHEMAS + "{name}")
    structs, shown = found[len(requests) : -len(SHOWN)], found[-len(SHOWN) :]
    for (_, field, _), struct, schema in zip(SHOWN, structs, shown, strict=True):
        place = components[struct["$ref"].removeprefix(_SCHEMAS)]["properties"]
        place[field] = {**place[field], **schema}
    named = zip(dialects, found, strict=False)
    paths = {dialect.path: {"post": _generation(dialect, schema)} for dialect, schema in named}
    plain: tuple[Json, Json] = json.loads(json.dumps([paths, components]).replace(_MODULES, ""))
    return plain[0], plain[1]


def _generation(dialect: type[Dialect], request: Json) -> Json:
    anthropic = dialect.path.startswith(ANTHROPIC)
    told = {"type": "object", "description": f"As {'Anthropic' if anthropic else 'OpenAI'} has it."}
    content: Json = {JSON: {"schema": told}}
    if dialect.generates:
        content["text/event-stream"] = {"schema": {"type": "string"}}  # with `stream: true`
    shown = RECEIPTS if dialect.generates else {"x-request-id": RECEIPTS["x-request-id"]}
    headers = {name: _text_header(text, required=name == "x-request-id") for name, text in shown.items()}
    statuses = (400, 401, 403, 404, 408, 413, 429, 500, 502, 503)
    errors = {str(status): _error(status, "AnthropicError" if anthropic else "Error") for status in statuses}
    return {
        "tags": ["generation" if dialect.generates else "counting"],
        "summary": dialect.__name__,
        "operationId": dialect.path.strip("/").replace("/", "_"),
        "security": _KEYS,
        "parameters": [REQUEST_ID],
        "requestBody": {"required": True, "content": {JSON: {"schema": request}}},
        "responses": {"200": {"description": "The answer.", "headers": headers, "content": content}, **errors},
    }


# errors


def _error_schemas() -> Json:
    types = [Envelope, RejectedEnvelope, InvalidFileEnvelope, NotServableEnvelope]
    found, components = msgspec.json.schema_components(types, ref_template=_SCHEMAS + "{name}")
    error, rejected, invalid, unservable = found
    kind = {"type": "string"}
    anthropic = {"type": "object", "required": ["type", "message"], "properties": {"type": kind, "message": kind}}
    return {
        **components,
        "Error": _object(error=error),
        "RejectedError": _object(error=rejected),
        "InvalidFileError": _object(error={"anyOf": [error, invalid]}),
        "NotServableError": _object(error={"anyOf": [error, unservable]}),
        "AnthropicError": _object(type={"const": "error"}, error=anthropic, request_id=kind),
    }


def _error(status: int, schema: str = "Error") -> Json:
    told: Json = {"description": f"{HTTPStatus(status).phrase}.", "content": _content({"$ref": _SCHEMAS + schema})}
    if status in (429, 503):
        retry = {"description": "Seconds.", "schema": {"type": "integer"}, "required": False}
        told["headers"] = {"retry-after": retry}
    return told


def _object(**properties: Json) -> Json:
    return {"type": "object", "required": list(properties), "properties": properties}


def _content(schema: Json) -> Json:
    return {JSON: {"schema": schema}}


def _text_header(text: str, *, required: bool = True) -> Json:
    return {"description": text, "schema": {"type": "string"}, "required": required}


_SUMMARY: Final = "One base model and a fitted adapter for every tenant."
_ABOUT: Final = (
    "Every call but `/health` and `/ready` needs a key. Other paths answer 404, other methods 405, both with the same "
    "envelope; without a key both are 401."
)
_KEYS: Final[list[Json]] = [{"bearer": []}, {"x-api-key": []}]
_SECURITY: Final = {
    "bearer": {"type": "http", "scheme": "bearer", "description": "A key, `sk-tailor-…`; its scopes say what for."},
    "x-api-key": {
        "type": "apiKey",
        "in": "header",
        "name": "x-api-key",
        "description": "The same key, where there is no `Authorization`.",
    },
}
_TAGS: Final = {
    "generation": "Scope `inference`.",
    "counting": "Scope `inference`; nothing is generated.",
    "models": "Scope `inference`.",
    "adapters": "Scope `adapters`.",
    "files": "Scope `training`.",
    "fine-tuning": "Scope `training`; permissions: scope `admin`.",
    "erasures": "Scope `adapters` or `training`; the public keys for every key.",
    "keys": "Scope `admin`: the keys of one's own tenant.",
    "usage": "Own use with scope `inference` or `admin`; everybody's with `operator`.",
    "admin": "Scope `operator`.",
    "replicas": "Scope `operator`.",
    "health": "Open to all.",
}
_BYTES: Final[Json] = {"schema": {"type": "string", "format": "binary"}}


def _form(*more: str) -> Json:
    """The two files, or an archive of them, with these fields."""
    named = {"type": "string", "pattern": "^[a-z0-9][a-z0-9._-]{0,63}$"}
    files = dict.fromkeys((*BUNDLE_FILES, "archive"), _BYTES["schema"])
    told = {"type": "object", "required": list(more), "properties": {**dict.fromkeys(more, named), **files}}
    return {"schema": {**told, "anyOf": [{"required": list(BUNDLE_FILES)}, {"required": ["archive"]}]}}


_FILE: Final[Json] = {
    "type": "object",
    "required": ["purpose", "file"],
    "properties": {
        "purpose": {"type": "string", "enum": ["fine-tune"]},
        "file": _BYTES["schema"],
        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer", "minimum": 3_600, "maximum": 2_592_000},
    },
}
_PART: Final[Json] = {"type": "object", "required": ["data"], "properties": {"data": _BYTES["schema"]}}
_UPLOADS: Final[Json] = {
    f"{FILE_UPLOADS}/{{upload_id}}/parts": {
        "required": True,
        "content": {"multipart/form-data": {"schema": _PART}},
    },
    FILES_PATH: {"required": True, "content": {"multipart/form-data": {"schema": _FILE}}},
    UPLOAD_PATH: {"required": True, "content": {"multipart/form-data": _form("name")}},
    f"{UPLOAD_PATH}/{{name}}/versions": {
        "required": True,
        "content": {
            "multipart/form-data": _form(),
            "application/x-tar": _BYTES,
            "application/gzip": _BYTES,
            "application/zip": _BYTES,
        },
    },
    f"{UPLOAD_PATH}/{{name}}/uploads/{{upload}}/{{file}}/{{number}}": {
        "required": True,
        "content": {"application/octet-stream": _BYTES},
    },
}
