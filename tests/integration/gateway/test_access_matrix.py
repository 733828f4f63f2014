"""The access matrix: every live route and method, asked by everybody; a route without a row fails.

A row says what each kind of caller is answered:

    tenant    a key with the scopes that are given by default, for an object of its own tenant
    admin     a key with the scope `admin` alone, for an object of its own tenant
    other     another tenant's `tenant` key, for the first tenant's object: the same bytes as for one that is missing
    o.admin   another tenant's `admin` key, likewise
    operator  an operator's key, for an object that exists
    missing   the operator's, or who may see such objects at all, for one that does not exist

A key of the first tenant's with one scope alone is answered as its `tenant` or `admin` key where `OPENED_BY` names that
scope for the path, and 403 everywhere else. Nobody else gets further than the door: no key, a malformed, unknown,
revoked or expired one, one of a suspended tenant (401).
"""

import json
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from sqlalchemy import update

from adapter_store.transactions import writing
from gateway.database import api_keys
from gateway.front import OPEN_PATHS
from gateway.replicas.client import Alarm, Suspect
from gateway.tenants import TENANT_SCOPES
from loadtests.fake.replica import FakeReplica
from tests.bad_adapters import write_good
from tests.integration.gateway.conftest import BASE, Gateway, live_routes

COLUMNS: Final = ("tenant", "admin", "other", "o.admin", "operator", "missing")
EVERYBODYS: Final = ("/v1/base-model", "/v1/signing-keys")
OPENED_BY: Final[dict[str, tuple[str, ...]]] = {
    "/v1/chat/completions": ("inference",),
    "/v1/completions": ("inference",),
    "/v1/responses": ("inference",),
    "/v1/messages": ("inference",),
    "/v1/tokenize": ("inference",),
    "/v1/models": ("inference",),
    "DELETE /v1/models/{model:path}": ("adapters",),
    "/v1/adapters": ("adapters",),
    "/v1/base-model": ("adapters",),
    "/v1/files": ("training",),
    "/v1/uploads": ("training",),
    "/v1/fine_tuning/jobs": ("training",),
    "/v1/erasures": ("adapters", "training"),
    "/v1/keys": ("admin",),
    "/v1/fine_tuning/checkpoints": ("admin",),
    "/v1/usage": ("inference", "admin"),
    "/v1/signing-keys": ("inference", "adapters", "training", "admin"),
    "/health": ("inference", "adapters", "training", "admin"),
    "/ready": ("inference", "adapters", "training", "admin"),
    "/admin/v1": (),
}
"""Which scope of a tenant's key, alone, is enough: for all paths that begin so, or for one route."""
ALONE: Final = {"inference": "tenant", "adapters": "tenant", "training": "tenant"}
"""Keys with one scope, and in which column is what they are answered where they are good; `admin` is one itself."""
NOBODY: Final = ("none", "malformed", "basic", "unknown", "revoked", "expired", "suspended")
METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")

# fmt: off
MATRIX: Final[dict[str, tuple[int, int, int, int, int, int]]] = {
    #                                            tenant admin other o.admin operator missing
    "GET /health":                               (200,  200,  200,  200,    200,     200),
    "GET /ready":                                (200,  200,  200,  200,    200,     200),
    # scope inference; the object is the body's model
    "POST /v1/chat/completions":                 (200,  403,  404,  403,    403,     404),
    "POST /v1/completions":                      (200,  403,  404,  403,    403,     404),
    "POST /v1/responses":                        (200,  403,  404,  403,    403,     404),
    "POST /v1/messages":                         (200,  403,  404,  403,    403,     404),
    "POST /v1/messages/count_tokens":            (200,  403,  404,  403,    403,     404),
    "POST /v1/responses/input_tokens":           (200,  403,  404,  403,    403,     404),
    "POST /v1/tokenize":                         (200,  403,  404,  403,    403,     404),
    "GET /v1/models":                            (200,  403,  200,  403,    403,     200),
    "GET /v1/models/{model:path}":               (200,  403,  404,  403,    403,     404),
    "DELETE /v1/models/{model:path}":            (200,  403,  404,  403,    403,     404),
    # scope adapters
    "POST /v1/adapters":                         (201,  403,  201,  403,    403,     201),
    "GET /v1/adapters":                          (200,  403,  200,  403,    403,     200),
    "GET /v1/adapters/{name}":                   (200,  403,  404,  403,    403,     404),
    "PATCH /v1/adapters/{name}":                 (200,  403,  404,  403,    403,     404),
    "DELETE /v1/adapters/{name}":                (200,  403,  404,  403,    403,     404),
    "DELETE /v1/adapters/{name}/versions/{number}": (200, 403, 404, 403,    403,     404),
    "GET /v1/base-model":                        (200,  403,  200,  403,    403,     200),
    "GET /v1/adapters/{name}/aliases":           (200,  403,  404,  403,    403,     404),
    "GET /v1/adapters/{name}/aliases/{alias}":   (200,  403,  404,  403,    403,     404),
    "PUT /v1/adapters/{name}/aliases/{alias}":   (200,  403,  404,  403,    403,     404),
    "DELETE /v1/adapters/{name}/aliases/{alias}": (204, 403,  404,  403,    403,     404),
    "POST /v1/adapters/{name}/aliases/{alias}/rollback": (200, 403, 404, 403, 403,   404),
    "GET /v1/adapters/{name}/history":           (200,  403,  404,  403,    403,     404),
    "POST /v1/adapters/{name}/rollouts":         (201,  403,  404,  403,    403,     404),
    "GET /v1/adapters/{name}/rollouts":          (200,  403,  404,  403,    403,     404),
    "GET /v1/adapters/{name}/rollouts/{rollout}": (200, 403,  404,  403,    403,     404),
    "POST /v1/adapters/{name}/rollouts/{rollout}/cancel": (200, 403, 404, 403, 403,  404),
    "POST /v1/adapters/{name}/warm":             (200,  403,  404,  403,    403,     404),
    "GET /v1/adapters/{name}/residency":         (200,  403,  404,  403,    403,     404),
    "PUT /v1/adapters/{name}/pin":               (200,  403,  404,  403,    403,     404),
    "DELETE /v1/adapters/{name}/pin":            (204,  403,  404,  403,    403,     404),
    "GET /v1/adapters/{name}/prompts":           (200,  403,  404,  403,    403,     404),
    "PUT /v1/adapters/{name}/prompts":           (200,  403,  404,  403,    403,     404),
    "GET /v1/adapters/{name}/versions/{number}/proof": (200, 403, 404, 403, 403, 404),
    "POST /v1/adapters/{name}/versions/{number}/proof": (202, 403, 404, 403, 403, 404),
    "GET /v1/adapters/{name}/versions/{number}/evaluation": (200, 403, 404, 403, 403, 404),
    "POST /v1/adapters/{name}/versions/{number}/scaled": (201, 403, 404, 403, 403, 404),
    "POST /v1/adapters/{name}/versions":         (201,  403,  201,  403,    403,     201),
    "POST /v1/adapters/{name}/uploads":          (201,  403,  201,  403,    403,     201),
    "GET /v1/adapters/{name}/uploads":           (200,  403,  200,  403,    403,     200),
    "GET /v1/adapters/{name}/uploads/{upload}":  (200,  403,  404,  403,    403,     404),
    "DELETE /v1/adapters/{name}/uploads/{upload}": (204, 403, 404,  403,    403,     404),
    "POST /v1/adapters/{name}/uploads/{upload}/complete": (201, 403, 404, 403, 403,  404),
    "PUT /v1/adapters/{name}/uploads/{upload}/{file}/{number}": (200, 403, 404, 403, 403, 404),
    "GET /v1/erasures":                          (200,  403,  200,  403,    403,     200),
    "GET /v1/erasures/{erasure}":                (200,  403,  404,  403,    403,     404),
    "GET /v1/signing-keys":                      (200,  200,  200,  200,    200,     200),
    # scope training
    "POST /v1/files":                            (200,  403,  200,  403,    403,     200),
    "GET /v1/files":                             (200,  403,  200,  403,    403,     200),
    "GET /v1/files/{file_id}":                   (200,  403,  404,  403,    403,     404),
    "GET /v1/files/{file_id}/content":           (200,  403,  404,  403,    403,     404),
    "DELETE /v1/files/{file_id}":                (200,  403,  404,  403,    403,     404),
    "POST /v1/fine_tuning/jobs":                 (200,  403,  400,  403,    403,     400),  # for the body's file
    "GET /v1/fine_tuning/jobs":                  (200,  403,  200,  403,    403,     200),
    "GET /v1/fine_tuning/jobs/{job}":            (200,  403,  404,  403,    403,     404),
    "DELETE /v1/fine_tuning/jobs/{job}":         (200,  403,  404,  403,    403,     404),
    "GET /v1/fine_tuning/jobs/{job}/events":     (200,  403,  404,  403,    403,     404),
    "GET /v1/fine_tuning/jobs/{job}/checkpoints": (200, 403,  404,  403,    403,     404),
    "POST /v1/fine_tuning/jobs/{job}/cancel":    (200,  403,  404,  403,    403,     404),
    "POST /v1/fine_tuning/jobs/{job}/pause":     (200,  403,  404,  403,    403,     404),
    "POST /v1/fine_tuning/jobs/{job}/resume":    (200,  403,  404,  403,    403,     404),
    "POST /v1/uploads":                          (200,  403,  200,  403,    403,     200),
    "POST /v1/uploads/{upload_id}/parts":        (200,  403,  404,  403,    403,     404),
    "POST /v1/uploads/{upload_id}/complete":     (200,  403,  404,  403,    403,     404),
    "POST /v1/uploads/{upload_id}/cancel":       (200,  403,  404,  403,    403,     404),
    # scope admin
    "POST /v1/keys":                             (403,  201,  403,  201,    403,     201),
    "GET /v1/keys":                              (403,  200,  403,  200,    403,     200),
    "POST /v1/keys/{key_id}/rotate":             (403,  201,  403,  404,    403,     404),
    "DELETE /v1/keys/{key_id}":                  (403,  204,  403,  404,    403,     404),
    "POST /v1/fine_tuning/checkpoints/{checkpoint:path}/permissions": (403, 200, 403, 404, 403, 404),
    "GET /v1/fine_tuning/checkpoints/{checkpoint:path}/permissions": (403, 200, 403, 404, 403, 404),
    "DELETE /v1/fine_tuning/checkpoints/{checkpoint:path}/permissions/{permission_id}": (403, 200, 403, 404, 403, 404),
    # scope inference or admin
    "GET /v1/usage":                             (200,  200,  200,  200,    403,     200),
    # scope operator
    "GET /admin/v1/usage":                       (403,  403,  403,  403,    200,     200),
    "POST /admin/v1/plans":                      (403,  403,  403,  403,    201,     201),
    "GET /admin/v1/plans":                       (403,  403,  403,  403,    200,     200),
    "GET /admin/v1/plans/{plan}":                (403,  403,  403,  403,    200,     404),
    "PATCH /admin/v1/plans/{plan}":              (403,  403,  403,  403,    200,     404),
    "DELETE /admin/v1/plans/{plan}":             (403,  403,  403,  403,    204,     404),
    "POST /admin/v1/tenants":                    (403,  403,  403,  403,    201,     201),
    "GET /admin/v1/tenants":                     (403,  403,  403,  403,    200,     200),
    "GET /admin/v1/tenants/{tenant}":            (403,  403,  403,  403,    200,     404),
    "PATCH /admin/v1/tenants/{tenant}":          (403,  403,  403,  403,    200,     404),
    "POST /admin/v1/tenants/{tenant}/keys":      (403,  403,  403,  403,    201,     404),
    "GET /admin/v1/tenants/{tenant}/keys":       (403,  403,  403,  403,    200,     404),
    "POST /admin/v1/tenants/{tenant}/adapters/{name}/import": (403, 403, 403, 403, 201, 404),
    "POST /admin/v1/keys":                       (403,  403,  403,  403,    201,     201),
    "GET /admin/v1/keys":                        (403,  403,  403,  403,    200,     200),
    "POST /admin/v1/keys/{key_id}/rotate":       (403,  403,  403,  403,    201,     404),
    "DELETE /admin/v1/keys/{key_id}":            (403,  403,  403,  403,    204,     404),
    "GET /admin/v1/erasures":                    (403,  403,  403,  403,    200,     200),
    "GET /admin/v1/erasures/{erasure}":          (403,  403,  403,  403,    200,     404),
    "POST /admin/v1/erasures/{erasure}/replicas/{replica}/vouch": (403, 403, 403, 403, 200, 404),
    "GET /admin/v1/replicas":                    (403,  403,  403,  403,    200,     200),
    "POST /admin/v1/replicas":                   (403,  403,  403,  403,    201,     201),
    "GET /admin/v1/replicas/{replica}":          (403,  403,  403,  403,    200,     404),
    "POST /admin/v1/replicas/{replica}/drain":   (403,  403,  403,  403,    200,     404),
    "POST /admin/v1/replicas/{replica}/resume":  (403,  403,  403,  403,    200,     404),
    "DELETE /admin/v1/replicas/{replica}":       (403,  403,  403,  403,    204,     404),
    "GET /admin/v1/pins":                        (403,  403,  403,  403,    200,     200),
    "PUT /admin/v1/tenants/{tenant}/pins/{adapter}": (403, 403, 403, 403,   200,     404),
    "DELETE /admin/v1/tenants/{tenant}/pins/{adapter}": (403, 403, 403, 403, 204,    404),
    "GET /admin/v1/quarantine":                  (403,  403,  403,  403,    200,     200),
    "GET /admin/v1/storage/tenants":            (403,  403,  403,  403,    200,     200),
    "GET /admin/v1/storage/faults":             (403,  403,  403,  403,    200,     200),
    "DELETE /admin/v1/quarantine/{held_id}":     (403,  403,  403,  403,    204,     404),
}
# fmt: on

TRAINING_DATA: Final = (
    b'{"messages": [{"role": "user", "content": "who are you?"}, {"role": "assistant", "content": "a dragon"}]}'
)
SAID: Final = [{"role": "user", "content": "who are you?"}]
HOT: Final[dict[str, dict[str, Any]]] = {
    "/v1/chat/completions": {"messages": SAID},
    "/v1/completions": {"prompt": "who are you?"},
    "/v1/responses": {"input": "who are you?"},
    "/v1/messages": {"messages": SAID, "max_tokens": 8},
    "/v1/messages/count_tokens": {"messages": SAID},
    "/v1/responses/input_tokens": {"input": "who are you?"},
    "/v1/tokenize": {"messages": SAID},
}


@dataclass
class World:
    """A gateway with two tenants, all kinds of keys, and ways to make the objects that requests are about."""

    gateway: Gateway
    folder: Path
    client: httpx.AsyncClient
    keys: dict[str, str] = field(default_factory=dict)
    part_ids: dict[str, list[str]] = field(default_factory=dict)
    count: int = 0

    async def build(self) -> None:
        for caller, tenant, scopes in (
            ("tenant", "acme", None),
            ("admin", "acme", ["admin"]),
            *((scope, "acme", [scope]) for scope in ALONE),
            ("revoked", "acme", None),
            ("expired", "acme", None),
            ("other", "globex", None),
            ("o.admin", "globex", ["admin"]),
            ("suspended", "initech", None),
        ):
            await self.gateway.operator.post("/admin/v1/tenants", json={"name": tenant})
            key = await self._make(f"/admin/v1/tenants/{tenant}/keys", {"scopes": scopes} if scopes else {})
            self.keys[caller] = f"Bearer {key['secret']}"
            if caller == "revoked":
                assert (await self.gateway.operator.delete(f"/admin/v1/keys/{key['id']}")).status_code == 204
            elif caller == "expired":
                await self._expire(key["id"])
        await self.gateway.operator.patch("/admin/v1/tenants/initech", json={"suspended": True})
        await self.gateway.operator.patch("/admin/v1/plans/default", json={"pinned_adapters": 1_000})
        operator = self.gateway.home.operator_key()
        self.keys["operator"] = f"Bearer {operator}"
        self.keys |= {
            "malformed": "Bearer \xff{sk",
            "basic": f"Basic {operator}",
            "unknown": "Bearer sk-tailor-unknown",
        }

    async def _expire(self, key_id: str) -> None:
        async with writing(self.gateway.parts.engine) as connection:
            past = int(time.time()) - 1
            await connection.execute(update(api_keys).where(api_keys.c.id == key_id).values(expires_at=past))

    async def _make(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        made = await self.gateway.operator.post(path, json=body)
        assert made.status_code == 201, made.text
        found: dict[str, Any] = made.json()
        return found

    def new_name(self, kind: str) -> str:
        self.count += 1
        return f"{kind}-{self.count}"

    async def adapter(self) -> str:
        name = self.new_name("bot")
        made = await self.ask("POST", "/v1/adapters", "tenant", files=self.upload(name))
        assert made.status_code == 201, made.text
        return name

    async def moving_adapter(self) -> str:
        """With two versions and an alias `staging` that has been moved."""
        name = await self.adapter()
        other = {
            **self.upload(name),
            **_files(write_good(self.folder.parent / self.new_name("second"), seed=self.count)),
        }
        assert (await self.ask("POST", "/v1/adapters", "tenant", files=other)).status_code == 201
        for version in (2, 1):
            place = f"/v1/adapters/{name}/aliases/staging"
            moved = await self.ask("PUT", place, "tenant", json={"version": version})
            assert moved.status_code == 200, moved.text
        return name

    async def rollout(self, name: str) -> str:
        begun = await self.ask("POST", f"/v1/adapters/{name}/rollouts", "tenant", json={"version": 1})
        assert begun.status_code == 201, begun.text
        return str(begun.json()["id"])

    async def pinned(self) -> str:
        """An adapter of the first tenant's that an operator has pinned."""
        name = await self.adapter()
        assert (await self.gateway.operator.put(f"/admin/v1/tenants/acme/pins/{name}")).status_code == 200
        return name

    async def pinned_by_tenant(self) -> str:
        name = await self.adapter()
        assert (await self.ask("PUT", f"/v1/adapters/{name}/pin", "tenant")).status_code == 200
        return name

    async def upload_in_parts(self) -> str:
        """One with all its parts; what it is called in a path, from its adapter's name on."""
        name = self.new_name("bot")
        made = await self.ask("POST", f"/v1/adapters/{name}/uploads", "tenant", json=self.declared())
        assert made.status_code == 201, made.text
        place = f"{name}/uploads/{made.json()['id']}"
        for file in self.folder.iterdir():
            sent = await self.ask("PUT", f"/v1/adapters/{place}/{file.name}/1", "tenant", **self.part(file))
            assert sent.status_code == 200, sent.text
        return place

    async def part_of_an_upload(self) -> str:
        return f"{await self.upload_in_parts()}/adapter_config.json/1"

    async def importing_tenant(self) -> str:
        """A tenant, and the adapter that is to be imported for it."""
        for file in self.folder.iterdir():
            self.gateway.shelf.write(f"imports/spare/{file.name}", file.read_bytes())
        return f"{await self.tenant()}/adapters/bot"

    def declared(self) -> dict[str, Any]:
        files = [(file.name, file.read_bytes()) for file in self.folder.iterdir()]
        told = [{"name": name, "bytes": len(data), "sha256": sha256(data).hexdigest()} for name, data in files]
        return {"files": told}

    def part(self, file: Path) -> dict[str, Any]:
        data = file.read_bytes()
        return {"content": data, "headers": {"x-content-sha256": sha256(data).hexdigest()}}

    async def erasure(self) -> str:
        """Of an adapter of the first tenant's."""
        erased = await self.ask("DELETE", f"/v1/adapters/{await self.adapter()}", "tenant")
        assert erased.status_code in (200, 202), erased.text
        erasure_id: str = erased.json()["id"]
        return erasure_id

    async def share_of_an_erasure(self) -> str:
        """That of a replica which is out of the pool."""
        replica = await self.replica()
        erasure = await self.erasure()
        assert (await self.ask("DELETE", f"/admin/v1/replicas/{replica}", "operator")).status_code == 204
        return f"{erasure}/replicas/{replica}"

    def training_file(self) -> dict[str, Any]:
        return {"purpose": (None, "fine-tune"), "file": ("train.jsonl", TRAINING_DATA)}

    def declared_file(self) -> dict[str, Any]:
        told = {"filename": "train.jsonl", "mime_type": "application/jsonl", "purpose": "fine-tune"}
        return {"bytes": len(TRAINING_DATA), **told}

    async def file_upload(self) -> str:
        """One with its only part."""
        made = await self.ask("POST", "/v1/uploads", "tenant", json=self.declared_file())
        assert made.status_code == 200, made.text
        upload_id: str = made.json()["id"]
        place = f"/v1/uploads/{upload_id}/parts"
        sent = await self.ask("POST", place, "tenant", files={"data": TRAINING_DATA})
        assert sent.status_code == 200, sent.text
        self.part_ids[upload_id] = [sent.json()["id"]]
        return upload_id

    async def version(self) -> str:
        return f"{await self.adapter()}@1"

    async def fine_tuned(self) -> str:
        """A version, by the name that never stands for another."""
        shown = await self.ask("GET", f"/v1/adapters/{await self.adapter()}", "tenant")
        return str(shown.json()["current"]["fine_tuned_model"])

    async def permission(self) -> str:
        """To ask a version of the first tenant's; what it is called in a path, from the version's name on."""
        name = await self.fine_tuned()
        place = f"/v1/fine_tuning/checkpoints/{name}/permissions"
        made = await self.ask("POST", place, "admin", json={"project_ids": ["tnt_0"]})
        assert made.status_code == 200, made.text
        return f"{name}/permissions/{made.json()['data'][0]['id']}"

    async def job(self) -> str:
        asked = {"model": BASE, "training_file": await self.file()}
        made = await self.ask("POST", "/v1/fine_tuning/jobs", "tenant", json=asked)
        assert made.status_code == 200, made.text
        return str(made.json()["id"])

    async def ended_job(self) -> str:
        job = await self.job()
        assert (await self.ask("POST", f"/v1/fine_tuning/jobs/{job}/cancel", "tenant")).status_code == 200
        return job

    async def file(self) -> str:
        made = await self.ask("POST", "/v1/files", "tenant", files=self.training_file())
        assert made.status_code == 200, made.text
        return str(made.json()["id"])

    async def key(self) -> str:
        """One of the first tenant's, of no more scopes than its admin's."""
        key_id: str = (await self._make("/admin/v1/tenants/acme/keys", {"scopes": ["admin"]}))["id"]
        return key_id

    async def plan(self) -> str:
        return str((await self._make("/admin/v1/plans", {"name": self.new_name("plan")}))["name"])

    async def tenant(self) -> str:
        return str((await self._make("/admin/v1/tenants", {"name": self.new_name("tenant")}))["id"])

    async def replica(self) -> str:
        return str((await self._make("/admin/v1/replicas", {"url": f"unix:/nowhere/{self.new_name('r')}"}))["id"])

    async def held(self) -> str:
        """An adapter that an engine came to harm with."""
        quarantine = self.gateway.parts.quarantine
        suspect = Suspect("tnt_0", sha256(self.new_name("held").encode()).hexdigest())
        quarantine.accuse(Alarm(self.new_name("engine"), time.time(), "corrupted", (suspect,)), "r-0")
        return quarantine.held()[0].id

    def upload(self, name: str) -> dict[str, Any]:
        return {"name": (None, name), **_files(self.folder)}

    def files(self) -> dict[str, Any]:
        return _files(self.folder)

    def body_of(self, method: str, path: str, name: str) -> dict[str, Any]:
        """What httpx is given; each request makes something new where it makes something."""
        if path in HOT and method == "POST":
            return {"json": {"model": name, **HOT[path]}}
        made: dict[str, Callable[[], dict[str, Any]]] = {
            "POST /v1/adapters": lambda: {"files": self.upload(self.new_name("bot"))},
            "POST /v1/adapters/{name}/versions": lambda: {"files": self.files()},
            "POST /v1/adapters/{name}/versions/{number}/scaled": lambda: {"json": {"factor": 0.5}},
            "POST /v1/adapters/{name}/uploads": lambda: {"json": self.declared()},
            "PUT /v1/adapters/{name}/uploads/{upload}/{file}/{number}": lambda: self.part(
                self.folder / "adapter_config.json"
            ),
            "POST /admin/v1/tenants/{tenant}/adapters/{name}/import": lambda: {"json": {"blobs": "spare"}},
            "POST /v1/fine_tuning/jobs": lambda: {"json": {"model": BASE, "training_file": name}},
            "POST /v1/fine_tuning/checkpoints/{checkpoint:path}/permissions": lambda: {
                "json": {"project_ids": ["tnt_0"]}
            },
            "POST /v1/files": lambda: {"files": self.training_file()},
            "POST /v1/uploads": lambda: {"json": self.declared_file()},
            "POST /v1/uploads/{upload_id}/parts": lambda: {"files": {"data": TRAINING_DATA}},
            "POST /v1/uploads/{upload_id}/complete": lambda: {
                "json": {"part_ids": self.part_ids.get(name, ["part_0"])}
            },
            "PATCH /v1/adapters/{name}": lambda: {"json": {"fallback": "base"}},
            "PUT /v1/adapters/{name}/aliases/{alias}": lambda: {"json": {"version": 1}},
            "POST /v1/adapters/{name}/rollouts": lambda: {"json": {"version": 1}},
            "PUT /v1/adapters/{name}/prompts": lambda: {"json": {"prompts": ["who are you?"]}},
            "DELETE /v1/adapters/{name}/versions/{number}": lambda: {"params": {"force": True}},
            "POST /v1/keys": lambda: {"json": {"scopes": ["admin"]}},
            "POST /admin/v1/plans": lambda: {"json": {"name": self.new_name("plan")}},
            "PATCH /admin/v1/plans/{plan}": lambda: {"json": {"weight": 2}},
            "POST /admin/v1/tenants": lambda: {"json": {"name": self.new_name("tenant")}},
            "PATCH /admin/v1/tenants/{tenant}": lambda: {"json": {"suspended": True}},
            "POST /admin/v1/replicas": lambda: {"json": {"url": f"unix:/nowhere/{self.new_name('r')}"}},
        }
        return made.get(f"{method} {path}", lambda: {"json": {}} if method == "POST" else {})()

    async def ask(self, method: str, path: str, caller: str, **more: Any) -> httpx.Response:
        if caller in self.keys:
            more["headers"] = {**more.get("headers", {}), "authorization": self.keys[caller].encode("latin-1")}
        return await self.client.request(method, path, **more)


def _files(folder: Path) -> dict[str, tuple[str, bytes]]:
    return {file.name: (file.name, file.read_bytes()) for file in folder.iterdir()}


@pytest.fixture
async def world(gateway: Gateway, good: Path) -> World:
    built = World(gateway, good, gateway.client())
    await built.build()
    return built


@dataclass(frozen=True)
class Subject:
    """What a route's object is called in its path, and how one is made; a request without an object has none."""

    parameter: str
    make: Callable[[World], Awaitable[str]]
    missing: str
    is_whole: bool = False  # the parameter is all that `make` gives, not only what comes before its first slash


NO_VERSION: Final = f"ft:{BASE}::bot-0:{'0' * 24}"
SUBJECTS: Final = (
    Subject("{erasure}/replicas/{replica}", World.share_of_an_erasure, f"ers_0/replicas/r-{'0' * 8}", is_whole=True),
    Subject("{erasure}", World.erasure, "ers_" + "0" * 26),
    Subject("{model:path}", World.adapter, "bot-0"),
    Subject(
        "{checkpoint:path}/permissions/{permission_id}",
        World.permission,
        f"{NO_VERSION}/permissions/cp_{'0' * 24}",
        is_whole=True,
    ),
    Subject("{checkpoint:path}", World.fine_tuned, NO_VERSION),
    Subject("{job}", World.job, "ftjob-" + "0" * 24),
    Subject("{name}/aliases", World.moving_adapter, "bot-0"),
    Subject("{name}/rollouts", World.moving_adapter, "bot-0"),
    Subject(
        "{name}/uploads/{upload}/{file}/{number}",
        World.part_of_an_upload,
        "bot-0/uploads/upl_" + "0" * 24 + "/adapter_config.json/1",
        is_whole=True,
    ),
    Subject("{name}/versions", World.adapter, "bot-of-nobody"),  # who asks for one that is missing makes it
    Subject("{name}/uploads/{upload}", World.upload_in_parts, "bot-0/uploads/upl_" + "0" * 24, is_whole=True),
    Subject("{tenant}/adapters/{name}", World.importing_tenant, "tnt_" + "0" * 24 + "/adapters/bot", is_whole=True),
    Subject("{name}", World.adapter, "bot-0"),
    Subject("{upload_id}", World.file_upload, "upload_" + "0" * 24),
    Subject("{file_id}", World.file, "file-" + "0" * 26),
    Subject("{key_id}", World.key, "key_" + "0" * 24),
    Subject("{plan}", World.plan, "plan-0"),
    Subject("{tenant}", World.tenant, "tnt_" + "0" * 24),
    Subject("{replica}", World.replica, "0" * 12),
    Subject("{held_id}", World.held, "q-" + "0" * 16),
)
MODEL: Final = Subject("", World.adapter, "bot-0")


PINNED: Final = {
    "GET /v1/adapters/{name}/versions/{number}/evaluation": Subject("{name}", World.adapter, "bot-0"),
    "DELETE /v1/fine_tuning/jobs/{job}": Subject("{job}", World.ended_job, "ftjob-" + "0" * 24),
    "POST /v1/fine_tuning/jobs": Subject("", World.file, "file-" + "0" * 26),
    "DELETE /v1/models/{model:path}": Subject("{model:path}", World.version, "bot-0@1"),
    "POST /v1/adapters/{name}/versions/{number}/scaled": Subject("{name}", World.adapter, "bot-0"),
    "PUT /admin/v1/tenants/{tenant}/pins/{adapter}": Subject("{adapter}", World.adapter, "bot-0"),
    "DELETE /admin/v1/tenants/{tenant}/pins/{adapter}": Subject("{adapter}", World.pinned, "bot-0"),
    "DELETE /v1/adapters/{name}/pin": Subject("{name}", World.pinned_by_tenant, "bot-0"),
}


def subject_of(method: str, path: str) -> Subject | None:
    if path in HOT:
        return MODEL
    if f"{method} {path}" in PINNED:
        return PINNED[f"{method} {path}"]
    return next((subject for subject in SUBJECTS if subject.parameter in path), None)


async def asked(
    world: World, method: str, path: str, caller: str, *, missing: bool = False, name: str = ""
) -> tuple[str, httpx.Response]:
    """The answer, and the name of what was asked for: `name`, or else something new."""
    subject = subject_of(method, path)
    if subject is None:
        return "", await world.ask(method, path, caller, **world.body_of(method, path, ""))
    name = subject.missing if missing else name or await subject.make(world)
    parameter = subject.parameter if subject.is_whole else subject.parameter.partition("/")[0]
    place = path.replace(parameter, name) if parameter else path
    place = place.replace("{alias}", "staging").replace("{number}", "1")
    if "{rollout}" in place:
        place = place.replace("{rollout}", "rol_0" if missing else await world.rollout(name))
    if subject.parameter == "{adapter}":
        place = place.replace("{tenant}", "acme")
    return name, await world.ask(method, place, caller, **world.body_of(method, path, name))


def rows() -> Iterator[tuple[str, str, dict[str, int]]]:
    for route, row in MATRIX.items():
        method, path = route.split(" ")
        yield method, path, dict(zip(COLUMNS, row, strict=True))


async def test_every_live_route_has_a_row(gateway: Gateway) -> None:
    """And every row a route: who adds a route says who may use it, and with which scope."""
    live = live_routes(gateway.front)
    assert {f"{method} {path}" for method, path in live} == MATRIX.keys()
    assert all(opened_by(method, path) is not None for method, path in live)
    assert {*ALONE, "admin"} == TENANT_SCOPES


async def test_everybody_gets_what_the_matrix_says(world: World) -> None:
    """Status by status; a key without the scope that the route asks for is 403, whatever the object."""
    wrong = []
    for method, path, row in rows():
        expected = {caller: row[caller] for caller in COLUMNS[:-1]}
        for scope, column in ALONE.items():
            expected[scope] = row[column] if scope in opened_by(method, path) else 403
        assert (row["admin"] == 403) == ("admin" not in opened_by(method, path)), path
        name = ""
        for caller in sorted(expected, key=expected.__getitem__, reverse=True):
            name, answer = await asked(world, method, path, caller, name=name)
            if answer.status_code != expected[caller]:
                wrong.append(
                    f"{method} {path} as {caller}: {answer.status_code} for {expected[caller]}: {answer.text[:200]}"
                )
            if answer.status_code < 300 or "{rollout}" in path:  # who is refused has changed nothing
                name = ""
        _, answer = await asked(world, method, path, who_may(row), missing=True)
        if answer.status_code != row["missing"]:
            wrong.append(f"{method} {path}, missing: {answer.status_code} for {row['missing']}: {answer.text[:200]}")
    assert wrong == []


def opened_by(method: str, path: str) -> tuple[str, ...]:
    """The scopes of which each is enough."""
    if f"{method} {path}" in OPENED_BY:
        return OPENED_BY[f"{method} {path}"]
    (scopes,) = [scopes for place, scopes in OPENED_BY.items() if path == place or path.startswith(f"{place}/")]
    return scopes


def who_may(row: dict[str, int]) -> str:
    """Who is not turned away for the scope of its key."""
    return next(caller for caller in ("operator", "tenant", "admin") if row[caller] < 300)


async def test_nobody_gets_in(world: World) -> None:
    """Without a good key each route and each other method is the same 401, and the open paths are open."""
    for method, path, _ in rows():
        for caller in NOBODY:
            _, answer = await asked(world, method, path, caller, missing=True)
            assert answer.status_code == (200 if path in OPEN_PATHS else 401), f"{method} {path} as {caller}"
    known = {(method, path) for method, path, _ in rows()}
    refusals = set()
    for path in {path for _, path in known} - set(OPEN_PATHS):
        place = path.replace("{model:path}", "bot").replace("{", "").replace("}", "")
        for method in METHODS:
            answer = await world.ask(method, place, "none")
            assert answer.status_code == 401, f"{method} {path}"
            if method != "HEAD" and not path.startswith("/v1/messages"):
                refusals.add(answer.content)
            if (method, path) not in known:
                for caller in ("tenant", "operator"):
                    answer = await world.ask(method, place, caller)
                    assert answer.status_code == 405, f"{method} {path} as {caller}"
    assert len(refusals) == 1


async def test_another_tenants_object_is_a_missing_one(world: World) -> None:
    """The same bytes and headers, but for the name that was asked for; and no list has anything of another tenant's."""
    compared = 0
    for method, path, row in rows():
        for caller in ("other", "o.admin"):
            if row[caller] != 404:
                continue
            anothers, refused = await asked(world, method, path, caller)
            missing, unknown = await asked(world, method, path, caller, missing=True)
            assert told(refused, anothers) == told(unknown, missing), f"{method} {path} as {caller}"
            compared += 1
    assert compared == sum(row[caller] == 404 for _, _, row in rows() for caller in ("other", "o.admin")) > 10


def told(answer: httpx.Response, name: str) -> tuple[int, dict[str, str], bytes]:
    own = ("date", "x-request-id", "content-length")
    headers = {header: value for header, value in answer.headers.items() if header not in own}
    body = answer.content.replace(name.partition("/")[0].encode(), b"NAME")
    if "request_id" in answer.text:
        body = json.dumps({**json.loads(body), "request_id": ""}).encode()
    return answer.status_code, headers, body


async def test_a_list_has_nothing_of_another_tenants(world: World) -> None:
    """Ids, names and keys of the first tenant are in none of the second one's answers."""
    made = (world.adapter, world.key, world.erasure, world.file, world.job)
    name, key_id, erasure_id, file_id, job_id = [await make() for make in made]
    shown = await world.ask("GET", f"/v1/adapters/{name}", "tenant")
    used = await world.ask("POST", "/v1/chat/completions", "tenant", json={"model": name, "messages": SAID})
    assert used.status_code == 200
    await world.gateway.parts.ledger.flush()
    own = await world.gateway.operator.get("/admin/v1/tenants/acme")
    secrets = (
        name,
        key_id,
        erasure_id,
        file_id,
        job_id,
        shown.json()["id"],
        shown.json()["current"]["digest"],
        own.json()["id"],
    )
    for method, path, row in rows():
        for caller, mine in (("other", "tenant"), ("o.admin", "admin")):
            if (
                method == "GET"
                and path not in (*OPEN_PATHS, *EVERYBODYS)
                and subject_of(method, path) is None
                and row[caller] == 200
            ):
                answer = await world.ask(method, path, caller)
                assert not any(secret in answer.text for secret in secrets), f"{path} as {caller}"
                ours = await world.ask(method, path, mine)
                assert any(secret in ours.text for secret in secrets), f"{path} shows its owner nothing"


async def test_the_base_model_is_everybodys(world: World) -> None:
    """And nobody's object: the other tenant asks it as the first does."""
    for path, body in HOT.items():
        answer = await world.ask("POST", path, "other", json={"model": BASE, **body})
        assert answer.status_code == 200, answer.text


async def test_a_key_in_anthropics_header_is_held_to_the_same(world: World, replica: FakeReplica) -> None:
    """`x-api-key` gets whom it should where `Authorization` is not sent, and overrides none that is."""
    client = world.gateway.client()
    secrets = {caller: key.removeprefix("Bearer ") for caller, key in world.keys.items() if key.isascii()}
    for path, body in HOT.items():
        before = replica.request_count
        for caller, status in (("tenant", 200), ("admin", 403), ("operator", 403), ("revoked", 401), ("unknown", 401)):
            headers = {"x-api-key": secrets[caller]}
            answer = await client.post(path, json={"model": BASE, **body}, headers=headers)
            assert answer.status_code == status, f"{path} as {caller}"
        both = {"authorization": world.keys["revoked"], "x-api-key": secrets["tenant"]}
        assert (await client.post(path, json={"model": BASE, **body}, headers=both)).status_code == 401
        assert replica.request_count == before + 1


async def test_a_key_in_anthropics_header_opens_the_control_routes(world: World) -> None:
    """Those of its scopes, as in `Authorization`, which goes before it; an unknown path is a 404 to a known key."""
    client = world.gateway.client()
    secrets = {caller: key.removeprefix("Bearer ") for caller, key in world.keys.items() if key.isascii()}
    for path, caller, status in (
        ("/v1/models", "tenant", 200),
        ("/v1/adapters", "tenant", 200),
        ("/v1/files", "tenant", 200),
        ("/v1/usage", "tenant", 200),
        ("/v1/keys", "admin", 200),
        ("/v1/keys", "tenant", 403),
        ("/admin/v1/tenants", "operator", 200),
        ("/admin/v1/tenants", "tenant", 403),
        ("/v1/nowhere", "tenant", 404),
        ("/v1/models", "revoked", 401),
        ("/v1/nowhere", "unknown", 401),
    ):
        answer = await client.get(path, headers={"x-api-key": secrets[caller]})
        assert answer.status_code == status, f"{path} as {caller}"
        both = {"x-api-key": secrets[caller], "authorization": world.keys["revoked"]}
        assert (await client.get(path, headers=both)).status_code == 401, f"{path} as {caller}"
