"""Texts and numbers that a database cannot hold, wherever the OpenAPI document says that one goes; on both kinds of it.

Of a generation request only its model comes near the database; `test_random_bodies` has the rest.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from gateway.openapi import document
from loadtests.fake.replica import FakeReplica
from tests.integration.gateway.conftest import BASE, Gateway, RunGateway, Tenant
from tests.servers import postgres_server

TEXTS: Final = ("\0", "x\0y", "\ud800", "\udcff", "é\u202e😀", "x" * 20_000, "%00", "' OR ''='", "")
NUMBERS: Final = (2**31, 2**63 - 1, 2**63, 2**64, 10**30, -1, -(2**63) - 1)
RAW_PATHS: Final = ("%00", "a%00b", "%FF", "%ED%A0%80", "%2F..%2F", "x" * 5_000)
RAW_BODIES: Final = (
    b"[" * 60_000,
    b'{"name": ' + b"9" * 6_000 + b"}",
    b'{"name": "\xff"}',
    b"\0",
    b"",
    b"null",
    b'"x"',
)
INT64: Final = 2**63 - 1
Json = dict[str, Any]


def operations() -> Iterator[tuple[str, str, Json]]:
    for path, item in document()["paths"].items():
        for method, operation in item.items():
            yield method.upper(), path, operation


def body_of(told: Json, operation: Json) -> Json | None:
    """The members of a request's JSON body, by name."""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is None:
        return None
    schema = content["schema"]
    [reference] = [choice["$ref"] for choice in schema.get("anyOf", [schema]) if "$ref" in choice]
    name = reference.rpartition("/")[2]
    properties: Json = told["components"]["schemas"][name]["properties"]
    return properties


def kinds(schema: Json) -> set[str]:
    """The JSON types that it may be, at its top."""
    found = {schema["type"]} if isinstance(schema.get("type"), str) else set()
    for choice in schema.get("anyOf", ()):
        found |= kinds(choice)
    return found


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
async def test_no_text_and_no_number_ends_in_a_server_error(
    database: str, run_gateway: RunGateway, replica: FakeReplica, good: Path
) -> None:
    """In paths, queries and bodies, of every operation, with a key that it is meant for."""
    if database == "sqlite":
        assert await ask_everything(await run_gateway(replica), good) > 400
        return
    with postgres_server() as server:
        gateway = await run_gateway(replica, database_url=server.url)
        assert await ask_everything(gateway, good) > 400


async def ask_everything(gateway: Gateway, good: Path) -> int:
    acme = await gateway.tenant("acme")
    assert (await acme.publish(good)).status_code == 201
    made = await gateway.operator.post("/admin/v1/tenants/acme/keys", json={"scopes": ["admin"]})
    admin = Tenant("acme", made.json()["secret"], gateway.client(made.json()["secret"]))
    told = document()
    asked, wrong = 0, []
    for method, path, operation in operations():
        client = acme.client
        if path.startswith("/admin"):
            client = gateway.operator
        elif path.startswith("/v1/keys"):
            client = admin.client
        for place, request in requests_of(told, method, path, operation):
            answer = await client.request(method, **request)
            asked += 1
            if answer.status_code >= 500:
                wrong.append(f"{method} {path} {place}: {answer.status_code}")
    assert wrong == []
    return asked


def requests_of(told: Json, method: str, path: str, operation: Json) -> Iterator[tuple[str, Json]]:
    plain = re.sub(r"\{\w+\}", "none", path)
    body = least_body(path, operation)
    for name in re.findall(r"\{\w+\}", path):
        for raw in RAW_PATHS:
            yield f"{name}={raw[:20]}", {"url": path.replace(name, raw), **body}
    for parameter in operation.get("parameters", ()):
        if parameter["in"] == "query":
            raws = ("%00", "a%00b", "%FF", "x" * 5_000, *map(str, NUMBERS))
            for raw in raws:
                yield f"{parameter['name']}={raw[:20]}", {"url": f"{plain}?{parameter['name']}={raw}", **body}
    if body and method != "GET":
        for content in RAW_BODIES:
            yield f"{content[:20]!r}", {"url": plain, **body, "content": content}
    hot = {"generation", "counting"} & set(operation["tags"])
    for name, schema in (body_of(told, operation) or {}).items():
        if hot and name != "model":
            continue
        values = [*(TEXTS if "string" in kinds(schema) or not kinds(schema) else TEXTS[:3])]
        values += [*NUMBERS, [TEXTS[0]], {TEXTS[0]: TEXTS[0]}]
        for value in values:
            content = json.dumps({**json.loads(body.get("content", b"{}")), name: value}).encode()
            yield f"{name}={str(value)[:20]!r}", {"url": plain, **body, "content": content}


def least_body(path: str, operation: Json) -> Json:
    """What else a request needs to get as far as the database."""
    if "requestBody" not in operation or path == "/v1/adapters":
        return {}
    said = [{"role": "user", "content": "hi"}]
    bodies: dict[str, Json] = {
        "/v1/chat/completions": {"model": BASE, "messages": said},
        "/v1/completions": {"model": BASE, "prompt": "hi"},
        "/v1/responses": {"model": BASE, "input": "hi"},
        "/v1/messages": {"model": BASE, "messages": said, "max_tokens": 4},
        "/v1/messages/count_tokens": {"model": BASE, "messages": said},
        "/v1/responses/input_tokens": {"model": BASE, "input": "hi"},
        "/v1/tokenize": {"model": BASE, "messages": said},
        "/admin/v1/tenants": {"name": "fresh"},
        "/admin/v1/plans": {"name": "fresh"},
        "/admin/v1/replicas": {"url": "unix:/nowhere/r"},
    }
    return {
        "content": json.dumps(bodies.get(path, {})).encode(),
        "headers": {"content-type": "application/json"},
    }


def test_every_number_of_a_control_request_has_bounds() -> None:
    """Within what a database's integers hold; and every text of a query is bounded."""
    told = document()
    numbers = texts = 0
    for method, path, operation in operations():
        if "generation" in operation["tags"] or "counting" in operation["tags"]:
            continue
        parameters = {one["name"]: one["schema"] for one in operation.get("parameters", ()) if one["in"] == "query"}
        for name, schema in {**parameters, **(body_of(told, operation) or {})}.items():
            for choice in schema.get("anyOf", [schema]):
                if choice.get("type") == "integer":
                    numbers += 1
                    assert choice.get("maximum", INT64 + 1) <= INT64, f"{method} {path} {name}"
                    assert "minimum" in choice or "exclusiveMinimum" in choice, f"{method} {path} {name}"
        for name, schema in parameters.items():
            for choice in schema.get("anyOf", [schema]):
                if choice.get("type") == "string":
                    texts += 1
                    assert "maxLength" in choice or "enum" in choice, f"{method} {path} {name}"
    assert (numbers > 50, texts > 20) == (True, True), (numbers, texts)
