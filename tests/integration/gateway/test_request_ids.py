"""`x-request-id` on what is no generation: every answer has one, and the log line of one that failed has the same."""

import re

import pytest
from sqlalchemy import update

from adapter_store.transactions import writing
from gateway.api import generation
from gateway.database import api_keys
from gateway.request_ids import SAFE_ID
from tests.integration.gateway.conftest import Gateway, Tenant

NEW = re.compile("[0-9a-f]{32}")


async def test_every_answer_says_which_request_it_is_for(
    gateway: Gateway, acme: Tenant, subtests: pytest.Subtests
) -> None:
    """A new id, or the client's own where it is a safe one; refusals before any route is looked for too."""
    stranger = gateway.client()
    for path, known, unknown in (
        ("/health", 200, 200),
        ("/v1/models", 200, 401),
        ("/v1/models/none", 404, 401),
        ("/nowhere", 404, 401),
        ("/v1/messages", 405, 401),
    ):
        for client, status in ((acme.client, known), (stranger, unknown)):
            with subtests.test(path=path, status=status):
                answers = [await client.get(path) for _ in range(2)]
                assert [answer.status_code for answer in answers] == [status] * 2
                first, second = [answer.headers["x-request-id"] for answer in answers]
                assert first != second
                assert NEW.fullmatch(first)
                own = await client.get(path, headers={"x-request-id": "mine:1.a_B-c"})
                assert own.headers.get_list("x-request-id") == ["mine:1.a_B-c"]
                for unsafe in (b"", b"a b", b"x" * 65, b"a/b", "ü".encode()):
                    answer = await client.get(path, headers=[(b"x-request-id", unsafe)])
                    assert NEW.fullmatch(answer.headers["x-request-id"]), unsafe


async def test_a_failure_is_logged_under_its_id(
    gateway: Gateway, acme: Tenant, caplog: pytest.LogCaptureFixture
) -> None:
    """A row that nothing of ours has written: the answer is a bare 500, and the log says which one it was."""
    broken = (await gateway.operator.post("/admin/v1/tenants/acme/keys", json={})).json()["id"]
    async with writing(gateway.parts.engine) as connection:
        await connection.execute(update(api_keys).where(api_keys.c.id == broken).values(scopes="nonsense"))
    path = "/admin/v1/tenants/acme/keys"
    answer = await gateway.operator.get(path, headers={"x-request-id": "mine-1"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine-1")
    (line,) = [record for record in caplog.records if "failed" in record.getMessage()]
    assert line.getMessage() == "request mine-1 failed: GET /admin/v1/tenants/{tenant}/keys"
    assert vars(line)["request_id"] == "mine-1"


def test_generation_has_the_same_rule() -> None:
    """One form of id, whatever is asked."""
    assert generation.SAFE_ID.pattern == SAFE_ID.pattern  # type: ignore[attr-defined]  # it is imported there
