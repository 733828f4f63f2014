"""Canaries: texts of a tenant's that must be in no log line, metric, span or error, whatever goes well or wrong.

A gateway process writes its real log at level DEBUG, exports every trace and is scraped, while keys, prompts, schemas,
adapters, headers and the engine's own error texts go through all dialects and through every failure that can be made
here. Names that a client itself has sent (`ECHOED`) may come back in its own 4xx, within bounds, and nowhere else; an
`x-request-id` of the safe form is an id, and is logged as one.
"""

import asyncio
import json
import re
import sqlite3
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from loadtests.fake.replica import FakeReplica, Faults
from tests.bad_adapters import Tensor, pack, write_good
from tests.gateways import GatewayProcess, gateway_settings, new_key, plain_client, until_ready
from tests.integration.gateway.conftest import BASE, RunReplica
from tests.integration.gateway.test_telemetry import SPAN_ID, TRACE_ID, Collector
from tests.ports import free_port

KINDS: Final = (
    "key", "prompt", "system", "tool", "argument", "schema", "metadata", "user", "cachekey", "stop", "value", "header",
    "requestid", "traceparent", "tracestate", "query", "path", "label", "config", "weights", "form", "engine", "answer",
    "model", "field", "adapter", "tensor", "part", "keyid",
)  # fmt: skip
CANARY: Final = {kind: f"canary{kind}5e11" for kind in KINDS}
ECHOED: Final = {"model", "field", "adapter", "tensor", "part", "keyid"}
"""What a client calls its things: its own 4xx may name them."""
FAULTY: Final = {"config"}
"""What a refused adapter's own 422 may quote."""
LONGEST_ERROR: Final = 2_000
INNER: Final = re.compile(
    r"/(?:home|root|tmp|opt|usr|work)/|/secret|\.tailor|site-packages|Traceback|\.py\b|CUDA|vllm|sqlalchemy|sqlite|\ba-[0-9a-f]{8,}",
    re.IGNORECASE,
)
"""Of the server's insides, in no answer that a tenant gets."""
ENGINE_TEXT: Final = json.dumps(
    {
        "error": {
            "message": f"{CANARY['engine']} in /opt/vllm/engine.py: a-0123456789abcdef: context is bad",
            "code": 500,
        }
    }
).encode()
TRACEPARENT: Final = f"00-{TRACE_ID}-{SPAN_ID}-01"


@dataclass
class Stage:
    """The gateway, one tenant's client, and everything that was answered."""

    gateway: GatewayProcess
    replica: FakeReplica
    client: httpx.AsyncClient
    key: str
    folder: Path
    answers: list[httpx.Response] = field(default_factory=list)

    async def ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        answer = await self.client.request(method, path, **more)
        self.answers.append(answer)
        return answer

    async def generate(self, path: str, **more: Any) -> httpx.Response:
        headers = {
            "x-request-id": CANARY["requestid"] + " {unsafe}",
            "traceparent": TRACEPARENT,
            "tracestate": f"vendor={CANARY['tracestate']}",
            "x-canary": CANARY["header"],
        }
        body = {"model": CANARY["adapter"], **SAYING[path], **more}
        return await self.ask("POST", f"{path}?note={CANARY['query']}", json=body, headers=headers)

    async def publish(self, name: str, config: bytes, weights: bytes, **more: Any) -> httpx.Response:
        files = {
            "adapter_config.json": (f"{CANARY['form']}.json", config),
            "adapter_model.safetensors": (f"{CANARY['form']}.bin", weights),
        }
        return await self.ask("POST", "/v1/adapters", data={"name": name, **more}, files=files)

    def database(self, *statements: str) -> None:
        with closing(sqlite3.connect(self.gateway.home / "tailor.db", timeout=10)) as connection:
            for statement in statements:
                connection.execute(statement)
            connection.commit()


SCHEMA: Final = {
    "type": "object",
    "properties": {CANARY["schema"]: {"type": "string", "description": CANARY["schema"]}},
}
FUNCTION: Final = {"name": "look_up", "description": CANARY["tool"], "parameters": SCHEMA}
CALL: Final = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "look_up", "arguments": json.dumps({"of": CANARY["argument"]})},
}
SAYING: Final[dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {
        "messages": [
            {"role": "system", "content": CANARY["system"]},
            {"role": "user", "content": CANARY["prompt"]},
            {"role": "assistant", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "call_1", "content": CANARY["answer"]},
        ],
        "tools": [{"type": "function", "function": FUNCTION}],
        "tool_choice": "required",
        "stop": [CANARY["stop"]],
        "metadata": {"note": CANARY["metadata"]},
        "user": CANARY["user"],
        "prompt_cache_key": CANARY["cachekey"],
    },
    "/v1/completions": {"prompt": CANARY["prompt"], "stop": CANARY["stop"], "user": CANARY["user"]},
    "/v1/responses": {
        "input": [{"role": "user", "content": CANARY["prompt"]}],
        "instructions": CANARY["system"],
        "tools": [{"type": "function", **FUNCTION}],
        "tool_choice": "required",
        "metadata": {"note": CANARY["metadata"]},
    },
    "/v1/messages": {
        "messages": [{"role": "user", "content": CANARY["prompt"]}],
        "system": CANARY["system"],
        "max_tokens": 8,
        "tools": [{"name": "look_up", "description": CANARY["tool"], "input_schema": SCHEMA}],
        "tool_choice": {"type": "any"},
        "metadata": {"user_id": CANARY["user"]},
    },
    "/v1/messages/count_tokens": {
        "messages": [{"role": "user", "content": CANARY["prompt"]}],
        "system": CANARY["system"],
    },
    "/v1/responses/input_tokens": {"input": CANARY["prompt"], "instructions": CANARY["system"]},
    "/v1/tokenize": {"messages": [{"role": "user", "content": CANARY["prompt"]}]},
}
ENGINES: Final = {"/v1/responses/input_tokens": "/tokenize", "/v1/tokenize": "/tokenize"}
"""Where the engine is asked elsewhere than the gateway."""
STREAMING: Final = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


@contextmanager
def collecting() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
async def stage(tmp_path: Path, base_folder: Path, run_replica: RunReplica) -> AsyncIterator[tuple[Stage, Collector]]:
    replica = await run_replica()
    with collecting() as collector:
        settings = {
            "TAILOR_LOG_LEVEL": "DEBUG",
            "TAILOR_OPERATOR_PORT": str(free_port()),
            "TAILOR_FIRST_BYTE_TIMEOUT_S": "2.5",
            "TAILOR_LOAD_TIMEOUT_S": "2.5",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_TRACES_SAMPLER": "always_on",
        }
        gateway = GatewayProcess(
            free_port(), tmp_path / "home", gateway_settings(base_folder, replica, **settings), tmp_path / "log"
        )
        try:
            await gateway.start()
            await gateway.serves()
            await until_ready(gateway.url)
            key = await new_key(gateway.url, gateway.operator_key())
            headers = {"authorization": f"Bearer {key}"}
            async with plain_client(base_url=gateway.url, headers=headers, timeout=30) as client:
                yield Stage(gateway, replica, client, key, tmp_path), collector
        finally:
            await gateway.kill()


@pytest.mark.local
async def test_no_canary_is_seen_outside(stage: tuple[Stage, Collector]) -> None:
    """In the log at DEBUG, on the metrics page, in exported spans and in what tenants are answered."""
    play, collector = stage
    await all_goes_well(play)
    await clients_err(play)
    await uploads_are_refused(play)
    await the_engine_fails(play)
    await the_database_fails(play)
    page = await metrics(play)
    play.gateway.signal(15)
    await play.gateway.ended()

    statuses = {answer.status_code for answer in play.answers}
    assert statuses >= {200, 201, 400, 401, 403, 404, 405, 413, 422, 500, 502, 503}, statuses
    assert 'route="/v1/messages"' in page
    assert len(collector.spans) > 50
    leaks = [*in_log(play), *leaks_of(page, "metrics", play)]
    for span in collector.spans:
        leaks += leaks_of(str(span), "span", play)
    for answer in play.answers:
        leaks += in_answer(answer, play)
    assert leaks == [], "\n".join(leaks)


async def all_goes_well(play: Stage) -> None:
    """Every dialect with the tenant's own adapter, whole and streamed; and what is shown of it."""
    folder = write_good(play.folder / "good", seed=1)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = f"/models/{CANARY['config']}/base"
    weights = (folder / "adapter_model.safetensors").read_bytes()
    published = await play.publish(CANARY["adapter"], json.dumps(config).encode(), weights)
    assert published.status_code == 201, published.text
    for path in SAYING:
        answer = await play.generate(path)
        assert answer.status_code == 200, answer.text
    for path in STREAMING:
        answer = await play.generate(path, stream=True)
        assert answer.status_code == 200, answer.text
    sent = json.dumps(play.replica.requests)
    assert all(CANARY[kind] in sent for kind in ("prompt", "system", "tool", "schema", "argument", "answer", "stop"))
    assert not any(CANARY[kind] in sent for kind in ("header", "requestid", "query", "metadata", "key"))
    for path in ("/v1/models", "/v1/adapters", f"/v1/adapters/{CANARY['adapter']}", "/v1/usage"):
        assert (await play.ask("GET", path)).status_code == 200
    changed = await play.ask("PATCH", f"/v1/adapters/{CANARY['adapter']}", json={"fallback": "base"})
    assert changed.status_code == 200


async def clients_err(play: Stage) -> None:
    """Every kind of 4xx, in every dialect."""
    for path in SAYING:
        for wrong in (
            {CANARY["field"]: CANARY["value"]},
            {"model": CANARY["model"]},
            {"model": [CANARY["value"]]},
            {"user": CANARY["user"] * 100, "temperature": CANARY["value"]},
            {"tools": [CANARY["tool"]], "messages": CANARY["prompt"], "input": {"a": CANARY["prompt"]}},
            {"cache_salt": CANARY["value"]},
        ):
            assert 400 <= (await play.generate(path, **wrong)).status_code < 500
        for content in (
            f'{{"model": "{CANARY["prompt"]}'.encode(),
            f'"{CANARY["prompt"]}"'.encode(),
            CANARY["prompt"].encode() + b"\xff\xfe",
            b'{"prompt": "' + CANARY["prompt"].encode() * 300_000 + b'"}',
        ):
            assert (await play.ask("POST", path, content=content)).status_code in (400, 413)
        stranger = {"authorization": f"Bearer sk-tailor-{CANARY['key']}", "x-api-key": CANARY["key"]}
        assert (await play.ask("POST", path, json={}, headers=stranger)).status_code == 401
        broken = {"traceparent": CANARY["traceparent"], "x-request-id": CANARY["requestid"] * 9}
        await play.ask("POST", path, json={"model": BASE, **SAYING[path]}, headers=broken)
        assert (await play.ask("GET", f"{path}?{CANARY['query']}")).status_code == 405
    for method, path, status in (
        ("GET", f"/v1/{CANARY['path']}", 404),
        ("GET", f"/v1/adapters/{CANARY['adapter']}x", 404),
        ("DELETE", f"/v1/adapters/{CANARY['adapter']}x", 404),
        ("GET", f"/v1/models/{CANARY['model']}", 404),
        ("GET", f"/v1/adapters?limit={CANARY['query']}", 400),
        ("GET", f"/admin/v1/tenants/{CANARY['path']}", 403),
        ("PUT", f"/v1/adapters/{CANARY['adapter']}", 405),
    ):
        assert (await play.ask(method, path)).status_code == status, path
    await keys_err(play)


async def keys_err(play: Stage) -> None:
    """With the key of the tenant's own admin: labels, and ids that there are not."""
    operator = {"authorization": f"Bearer {play.gateway.operator_key()}"}
    made = await play.client.post(
        "/admin/v1/tenants/acme/keys", headers=operator, json={"scopes": ["admin"], "label": CANARY["label"]}
    )
    admin = {"authorization": f"Bearer {made.json()['secret']}"}
    for method, path, body in (
        ("POST", "/v1/keys", {"label": CANARY["label"], "scopes": ["admin"]}),
        ("POST", "/v1/keys", {"label": CANARY["label"] * 20}),
        ("POST", "/v1/keys", {"scopes": [CANARY["value"]]}),
        ("POST", f"/v1/keys/{CANARY['keyid']}/rotate", {}),
        ("DELETE", f"/v1/keys/{CANARY['keyid']}", None),
    ):
        await play.ask(method, path, json=body, headers=admin)
    play.answers[-5:-4] = []  # the new key's own answer, which shows what is its own


async def uploads_are_refused(play: Stage) -> None:
    """Broken forms, files and names."""
    tensor = {f"base_model.model.{CANARY['tensor']}.lora_A.weight": Tensor("F32", [1], b"\0" * 4)}
    weights = pack(tensor, {"note": CANARY["weights"]})
    config = json.dumps({CANARY["config"]: CANARY["config"], "peft_type": CANARY["config"], "r": 8}).encode()
    for answer in (
        await play.publish(CANARY["adapter"], config, weights),
        await play.publish(CANARY["adapter"], b"{" + CANARY["config"].encode(), CANARY["weights"].encode() * 9),
        await play.publish(CANARY["adapter"].upper() + " / ..", config, weights),
        await play.publish(CANARY["adapter"], config, weights, **{CANARY["part"]: CANARY["form"]}),
        await play.ask("POST", "/v1/adapters", content=CANARY["form"], headers={"content-type": CANARY["form"]}),
    ):
        assert 400 <= answer.status_code < 500, answer.text


async def the_engine_fails(play: Stage) -> None:
    """Error texts, broken streams, silence, failed loads; in every dialect."""
    for faults in (
        Faults(status=400, status_body=ENGINE_TEXT),
        Faults(status=404, status_body=ENGINE_TEXT),
        Faults(status=422, status_body=ENGINE_TEXT),
        Faults(status=500, status_body=ENGINE_TEXT),
        Faults(status=503, status_body=ENGINE_TEXT),
        Faults(status=200, status_body=ENGINE_TEXT),
        Faults(status=200, status_body=b"not JSON: " + ENGINE_TEXT),
        Faults(hang_before_answer=True),
    ):
        # one that has said 404 is suspected, and asked for nothing until it is looked at again
        for paths in [[path] for path in SAYING] if faults.status == 404 else [list(SAYING)]:
            for answer in await while_failing(play, faults, paths):
                assert answer.status_code >= 400, answer.text
    for faults in (
        Faults(error_event_after=0),
        Faults(error_event_after=2),
        Faults(garble_after=1),
        Faults(truncated_after=1),
        Faults(die_after_events=1),
        Faults(reset_after=1),
        Faults(head_then_nothing=True),
    ):
        await while_failing(play, faults, STREAMING, stream=True)
    await loads_fail(play)


async def while_failing(play: Stage, faults: Faults, paths: Iterable[str], **more: Any) -> list[httpx.Response]:
    """The answers to a request to each path, at once; all of them get to the engine."""
    await until_ready(play.gateway.url)
    before = len(play.replica.requests)
    play.replica.faults = faults
    answers = await asyncio.gather(*(play.generate(path, **more) for path in paths))
    play.replica.faults = Faults()
    asked = Counter(request["path"] for request in play.replica.requests[before:])
    assert asked >= Counter(ENGINES.get(path, path) for path in paths), faults
    return answers


async def loads_fail(play: Stage) -> None:
    """An adapter that no engine takes, with and without who stands in for it."""
    folder = write_good(play.folder / "cold", seed=7)
    files = [(folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]
    for number, faults in enumerate((Faults(load_status=500), Faults(load_absent=True), Faults(load_hangs=1))):
        play.replica.faults = faults
        name = f"{CANARY['adapter']}.{number}"
        assert (await play.publish(name, *files)).status_code == 201
        for path in STREAMING:
            await play.generate(path, model=name)
        assert (await play.ask("DELETE", f"/v1/adapters/{name}")).status_code == 200
    play.replica.faults = Faults()


async def the_database_fails(play: Stage) -> None:
    """Tables that are away, rows that cannot be, inserts that are refused."""
    await until_ready(play.gateway.url)
    folder = write_good(play.folder / "more", seed=9)
    files = [(folder / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")]
    name = CANARY["adapter"]
    play.database("CREATE TRIGGER no BEFORE INSERT ON adapters BEGIN SELECT RAISE(ABORT, 'no'); END")
    assert (await play.publish(f"{name}.new", *files)).status_code == 500
    play.database("DROP TRIGGER no", "UPDATE versions SET rank = 'many'")
    assert (await play.ask("GET", f"/v1/adapters/{name}")).status_code == 500
    play.database("UPDATE versions SET rank = 8")
    spoilt = await new_key(play.gateway.url, play.gateway.operator_key(), "spoilt")
    play.database("UPDATE api_keys SET scopes = 'nonsense' WHERE created_at = (SELECT max(created_at) FROM api_keys)")
    headers = {"authorization": f"Bearer {spoilt}"}
    for path in SAYING:
        answer = await play.ask("POST", path, json={"model": BASE, **SAYING[path]}, headers=headers)
        assert answer.status_code == 500, answer.text
    for table in ("adapters", "api_keys"):
        play.database(f"ALTER TABLE {table} RENAME TO away")
        for path in SAYING:
            await play.generate(path, model=CANARY["model"])
            await play.ask("POST", path, json={}, headers={"authorization": f"Bearer {CANARY['key']}"})
        for method, path in (
            ("GET", "/v1/adapters"),
            ("GET", f"/v1/adapters/{name}"),
            ("DELETE", f"/v1/adapters/{name}"),
        ):
            await play.ask(method, path)
        await play.publish(f"{name}.new", *files)
        play.database(f"ALTER TABLE away RENAME TO {table}")


async def metrics(play: Stage) -> str:
    port = play.gateway.settings["TAILOR_OPERATOR_PORT"]
    async with httpx.AsyncClient() as client:
        page = await client.get(f"http://127.0.0.1:{port}/metrics")
    assert page.status_code == 200
    return page.text


def in_log(play: Stage) -> list[str]:
    """Every line is JSON, and none has a canary."""
    lines = play.gateway.log.read_text().splitlines()
    levels = {json.loads(line)["level"] for line in lines}
    assert levels >= {"info", "warning", "error"}
    assert sum("traceback" in line for line in lines) >= 9
    return [leak for line in lines for leak in leaks_of(line, "log", play)]


def leaks_of(text: str, where: str, play: Stage) -> list[str]:
    """What is in there of a tenant's or an operator's."""
    found = [kind for kind, canary in CANARY.items() if canary in text.lower()]
    found += [
        kind for kind, key in (("own key", play.key), ("operator's key", play.gateway.operator_key())) if key in text
    ]
    return [f"{', '.join(found)} in {where}: {text[:4_000]}"] if found else []


def in_answer(answer: httpx.Response, play: Stage) -> list[str]:
    """What a tenant reads: nothing of the server's insides; of its own words only names, and those in its 4xx."""
    request = answer.request
    shown = "\n".join([*(f"{name}: {value}" for name, value in answer.headers.items()), answer.text])
    inner = [found[0] for found in INNER.finditer(shown)]
    inner += [name for name in (*play.replica.used_names, play.key, CANARY["engine"]) if name in shown]
    if answer.status_code >= 400 or "error" in answer.text:
        echoed = (ECHOED if answer.status_code < 500 else set()) | (FAULTY if answer.status_code == 422 else set())
        told = shown.replace(f"x-tailor-adapter: {CANARY['adapter']}", "")  # the receipt, to whom the adapter belongs
        told = told.replace(f'"metadata":{{"note":"{CANARY["metadata"]}"}}', "")  # of a response that broke off
        inner += [kind for kind, canary in CANARY.items() if kind not in echoed and canary in told.lower()]
        if len(answer.text) > LONGEST_ERROR and answer.status_code not in (200, 422):
            inner.append(f"{len(answer.text)} characters")
    place = f"{request.method} {request.url.path} → {answer.status_code}"
    return [f"{', '.join(inner)} in {place}: {shown[:2_000]}"] if inner else []
