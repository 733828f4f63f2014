"""What an operator does first: a tenant and its key."""

from pathlib import Path

from loadtests.overhead.stack import CannotMeasureError
from loadtests.store.client import Answer, connected


def new_tenant(port: int, home: Path, name: str = "benchmark") -> str:
    """The key of a new tenant.

    Raises:
        CannotMeasureError: the gateway refuses.
    """
    with connected(port, (home / "operator-key").read_text().strip()) as operator:
        tenant = good(operator.ask("POST", "/admin/v1/tenants", {"name": name})).json()
        key = good(operator.ask("POST", f"/admin/v1/tenants/{tenant['id']}/keys", {"label": name})).json()
    return str(key["secret"])


def good(answer: Answer) -> Answer:
    """The answer, if it is one.

    Raises:
        CannotMeasureError: it is a refusal.
    """
    if answer.status not in (200, 201, 202):
        raise CannotMeasureError(f"{answer.status}: {answer.body[:2_000]!r}")
    return answer
