"""What requests leave behind: nothing that only a search for cycles finds."""

import gc
from collections import Counter
from collections.abc import Iterator

import pytest

from loadtests.fake.replica import FakeReplica
from tests.integration.gateway.conftest import BASE, Tenant

MESSAGES = [{"role": "user", "content": "x"}]
REQUESTS = 20


@pytest.fixture
def garbage() -> Iterator[list[object]]:
    """What the collector finds from here on, kept instead of freed."""
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()


@pytest.mark.parametrize(
    ("body", "engine", "status"),
    [
        ({"model": BASE, "messages": MESSAGES}, None, 200),
        ({"model": BASE, "messages": MESSAGES, "stream": True}, None, 200),
        ({"model": "missing", "messages": MESSAGES}, None, 404),
        ({"model": BASE, "messages": "none"}, None, 400),
        ({"model": BASE, "messages": MESSAGES}, 400, 400),
        ({"model": BASE, "messages": MESSAGES}, 429, 503),
    ],
    ids=["whole", "streamed", "unknown", "refused", "refused by the engine", "engine full"],
)
async def test_a_request_is_freed_when_it_is_over(
    acme: Tenant, replica: FakeReplica, garbage: list[object], body: dict[str, object], engine: int | None, status: int
) -> None:
    """One that refers to itself waits for the collector, which then runs three times as often."""
    replica.faults.status = engine
    for _ in range(REQUESTS):
        answer = await acme.client.post("/v1/chat/completions", json=body)
        assert answer.status_code == status
    gc.collect()
    left = Counter(type(each).__name__ for each in garbage if type(each).__module__.startswith("gateway."))
    assert not left, f"{left} of {REQUESTS} requests"
