"""Takes away at a server what a load test made there. What cannot be taken away is told by name.

First all is erased that is kept, and so paid for; then, in a time of its own, keys are revoked and tenants suspended: a
server that erases slowly is closed all the same. A tenant is known by its name alone, so that one whose making was
broken off is found too.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Final

from loadtests.api import Api, ServerRefused, ServerUnreachable

AT_ONCE: Final = 4
ERASE_S: Final = 60.0
ERASE_EACH_S: Final = 0.25  # of each adapter beside that
CLOSE_S: Final = 15.0
CLOSE_EACH_S: Final = 0.1  # of each tenant beside that
_OVER: Final = ("succeeded", "failed", "cancelled")
_SCOPES: Final = ["adapters", "training"]
_SHOWN: Final = 3
_PAGE: Final = 1_000


@dataclass(slots=True)
class Cleaning:
    """The end of a load test at a server; `left` says at any time what is still there."""

    api: Api
    operator_key: str
    tenants: Sequence[str]  # their names at the server
    plans: Sequence[str] = ()
    erase_s: float = ERASE_S
    close_s: float = CLOSE_S
    _undone: dict[str, list[str]] = field(default_factory=dict)
    _faults: dict[str, list[str]] = field(default_factory=dict)

    async def run(self) -> None:
        """As far as the server lets us: it may be the one thing that does not work any more."""
        stages = (("not erased", self._erase, self.erase_s), ("not closed", self._close, self.close_s))
        self._undone = {name: [undone for undone, _, _ in stages] for name in self.tenants}
        self._undone |= {plan: ["not deleted"] for plan in self.plans}
        for undone, work, most_s in stages:
            await self._within(most_s, self.tenants, undone, work)
        await self._within(self.close_s, self.plans, "not deleted", self._delete_plan)

    def left(self) -> list[str]:
        """What could not be cleaned, a line a tenant or plan."""
        faults = {name: [*undone, *self._faults.get(name, ())] for name, undone in self._undone.items()}
        return [f"{name}: {_some(told)}" for name, told in faults.items() if told]

    async def _within(
        self, most_s: float, names: Sequence[str], undone: str, work: Callable[[str], Awaitable[None]]
    ) -> None:
        """Of every name, a few at a time; those that there was no time for stay undone."""
        places = asyncio.Semaphore(AT_ONCE)

        async def one(name: str) -> None:
            async with places:
                await work(name)
            self._undone[name].remove(undone)

        with suppress(TimeoutError):
            async with asyncio.timeout(most_s), asyncio.TaskGroup() as group:
                for name in names:
                    group.create_task(one(name))

    async def _erase(self, name: str) -> None:
        async with self._noting(name, "tenant"):
            await self._do("PATCH", f"/admin/v1/tenants/{name}", {"plan": "default", "suspended": False})
            body = {"label": "loadtest clean-up", "scopes": _SCOPES}
            key = str((await self._do("POST", f"/admin/v1/tenants/{name}/keys", body))["secret"])
            for job in await self._listed(key, "/v1/fine_tuning/jobs"):
                async with self._noting(name, f"job {job['id']}"):
                    await self._erase_job(key, job)
            for kind, path, known_as in (("adapter", "/v1/adapters", "name"), ("file", "/v1/files", "id")):
                for one in await self._listed(key, path, known_as):
                    async with self._noting(name, f"{kind} {one[known_as]}"):
                        await self.api.call(key, "DELETE", f"{path}/{one[known_as]}?force=true")

    async def _erase_job(self, key: str, job: dict[str, Any]) -> None:
        path = f"/v1/fine_tuning/jobs/{job['id']}"
        if job["status"] not in _OVER:
            try:
                await self.api.call(key, "POST", f"{path}/cancel")
            except ServerRefused as error:
                if error.status != 400:  # it has ended by itself meanwhile
                    raise
        await self.api.call(key, "DELETE", f"{path}?force=true")

    async def _close(self, name: str) -> None:
        path = f"/admin/v1/tenants/{name}"
        async with self._noting(name, "keys"):
            for key in await self._listed(self.operator_key, f"{path}/keys"):
                if key["revoked_at"] is None:
                    async with self._noting(name, f"key {key['id']}"):
                        await self._do("DELETE", f"/admin/v1/keys/{key['id']}")
        async with self._noting(name, "suspension"):
            await self._do("PATCH", path, {"suspended": True})

    async def _delete_plan(self, name: str) -> None:
        async with self._noting(name, "plan"):
            await self._do("DELETE", f"/admin/v1/plans/{name}")

    async def _listed(self, key: str, path: str, known_as: str = "id") -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        while True:
            after = f"&after={found[-1][known_as]}" if found else ""
            told = await self.api.call(key, "GET", f"{path}?limit={_PAGE}{after}")
            found += told["data"]
            if not told["data"] or not told.get("has_more"):
                return found

    async def _do(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        return await self.api.call(self.operator_key, method, path, body)

    @asynccontextmanager
    async def _noting(self, name: str, what: str) -> AsyncIterator[None]:
        """What is not there is clean."""
        try:
            yield
        except (ServerRefused, ServerUnreachable) as error:
            if not (isinstance(error, ServerRefused) and error.status == 404):
                self._faults.setdefault(name, []).append(f"{what}: {error}")


def _some(faults: Sequence[str]) -> str:
    more = f" and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return "; ".join(faults[:_SHOWN]) + more
