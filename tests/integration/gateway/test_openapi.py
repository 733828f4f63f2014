"""The OpenAPI document against the live gateway: it names what there is, and nothing built from it ends in a 5xx.

The ordinary run makes some hundred requests; `-m full` makes 200 for each operation and key.
"""

import asyncio
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from typer.testing import CliRunner

from gateway.cli import app as command
from gateway.openapi import ANTHROPIC, document
from loadtests.fake.replica import FakeReplica
from tests.integration.gateway.conftest import BASE, Gateway, Tenant, live_routes

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}


def told_routes(told: dict[str, Any]) -> set[tuple[str, str]]:
    return {
        (method.upper(), re.sub(r"{(model|checkpoint)}", r"{\1:path}", path))
        for path, item in told["paths"].items()
        for method in item.keys() & METHODS
    }


async def test_every_live_route_is_in_the_document(gateway: Gateway) -> None:
    """And the document has no other."""
    assert told_routes(document()) == live_routes(gateway.front)


def test_every_reference_of_the_document_leads_somewhere() -> None:
    """Names of two dialects' types do not meet either: each request has its own."""
    told = document()

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                kind, name = node["$ref"].removeprefix("#/components/").split("/")
                assert name in told["components"][kind]
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(told)
    requests = [
        item["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        for path, item in told["paths"].items()
        if "generation" in item.get("post", {}).get("tags", ()) or "counting" in item.get("post", {}).get("tags", ())
    ]
    assert len(set(requests)) == len(requests) == 7


def test_no_field_of_a_request_is_left_untold() -> None:
    """Where a request's type keeps raw JSON, the document says what that may be."""
    untold = {
        f"{name}.{field}"
        for name, schema in document()["components"]["schemas"].items()
        for field, told in schema.get("properties", {}).items()
        if not told.keys() - {"default", "description", "title"}
    }
    assert untold == {"responses.TextPart.logprobs"}  # comes back from an answer, and is not read


def test_every_operation_but_two_asks_for_a_key_and_tells_its_errors() -> None:
    """401 and 403, in the envelope of its dialect."""
    for path, item in document()["paths"].items():
        for operation in item.values():
            if path in ("/health", "/ready"):
                assert "security" not in operation
                continue
            assert {"bearer": []} in operation["security"], path
            envelope = "AnthropicError" if path.startswith(ANTHROPIC) else "Error"
            for status in ("401", "403"):
                told = operation["responses"][status]["content"]["application/json"]["schema"]
                assert told == {"$ref": f"#/components/schemas/{envelope}"}, path


def test_the_command_writes_the_document(tmp_path: Path) -> None:
    """To a file or to standard output, without a server, a base model or settings."""
    run = CliRunner()
    out = tmp_path / "openapi.json"
    assert run.invoke(command, ["openapi", "--out", str(out)]).exit_code == 0
    printed = run.invoke(command, ["openapi"])
    assert json.loads(out.read_text()) == json.loads(printed.stdout) == document()


@dataclass
class Seen:
    """What schemathesis was answered."""

    statuses: Counter[int] = field(default_factory=Counter)
    succeeded: set[str] = field(default_factory=set)


TENANT = {"generation", "counting", "models", "adapters", "files", "fine-tuning", "usage", "health"}
ADMIN = {"keys", "fine-tuning", "usage"}
OPERATOR = {"admin", "replicas", "usage"}


def fuzz(url: str, key: str, tags: set[str], *, examples: int, seen: Seen) -> None:
    """Every operation that the key is for with generated requests, valid and not; one of each that it is not for."""
    told = document()
    for item in told["paths"].values():
        for operation in item.values():
            operation.pop("security", None)  # the key is ours: schemathesis would leave it out at times
    for found in schemathesis.openapi.from_dict(told).get_all_operations():
        operated: Any = found.ok()  # type: ignore[union-attr]  # an operation that is broken would raise here
        meant = tags & set(operated.tags)
        _fuzz_one(operated, url, key, examples if meant else 1, seen)


def _fuzz_one(operation: Any, url: str, key: str, examples: int, seen: Seen) -> None:
    modes = [operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]
    known = {"name": "bot", "model": "bot", "tenant": "acme", "plan": "default"}

    @seed(1)
    @settings(
        max_examples=examples,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=st.one_of(modes), real=st.booleans(), name=st.sampled_from(["bot", BASE]))
    def ask(case: Any, real: bool, name: str) -> None:
        if real:  # else hardly a request would meet an object that exists
            parameters = dict(case.path_parameters or {})
            case.path_parameters = {at: known.get(at, value) for at, value in parameters.items()}
            if isinstance(case.body, dict) and "model" in case.body:
                case.body["model"] = name
        answer = case.call(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=30)
        case.validate_response(answer, checks=CHECKS)
        _check_envelope(operation.path, answer)
        seen.statuses[answer.status_code] += 1
        if answer.status_code < 300:
            seen.succeeded.add(operation.label)

    ask()


def _check_envelope(path: str, answer: Any) -> None:
    """Every error is one, in its dialect's words."""
    if answer.status_code < 400:
        return
    told = answer.json()
    if path.startswith(ANTHROPIC):
        assert set(told) == {"type", "error", "request_id"}
        assert set(told["error"]) == {"type", "message"}
    else:
        assert set(told["error"]) - {"faults", "nearest"} == {"message", "type", "param", "code"}


REACHED = {"POST /v1/chat/completions", "GET /v1/adapters", "GET /v1/keys", "GET /admin/v1/usage"}


async def run_fuzz(gateway: Gateway, acme: Tenant, good: Path, examples: int) -> Seen:
    await acme.publish(good)
    operator = gateway.home.operator_key()
    assert operator is not None
    spare = await gateway.operator.post("/admin/v1/keys", json={})
    admin = await gateway.operator.post("/admin/v1/tenants/acme/keys", json={"scopes": ["admin"]})
    seen = Seen()
    for key, tags in ((acme.key, TENANT), (admin.json()["secret"], ADMIN), (spare.json()["secret"], OPERATOR)):
        await asyncio.to_thread(fuzz, gateway.url, key, tags, examples=examples, seen=seen)
    assert seen.statuses[401] == 0
    assert (await gateway.operator.get("/ready")).status_code == 200
    return seen


async def test_no_generated_request_ends_in_a_server_error(
    gateway: Gateway, acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    """With a tenant's, its admin's and an operator's key, each answer is as the document says."""
    seen = await run_fuzz(gateway, acme, good, examples=3)
    assert seen.statuses.total() > 250
    assert seen.succeeded >= REACHED, seen


@pytest.mark.full
@pytest.mark.timeout(3_600)
async def test_no_generated_request_ends_in_a_server_error_at_full_size(
    gateway: Gateway, acme: Tenant, good: Path, replica: FakeReplica
) -> None:
    """200 for each operation and key."""
    seen = await run_fuzz(gateway, acme, good, examples=200)
    assert seen.statuses.total() > 8_000
