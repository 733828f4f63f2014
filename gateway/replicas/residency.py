"""Which adapters one replica holds, as this gateway knows it: hold, load when cold, let go.

The replica owns the truth: `adopt` takes it over from its report. What is here only saves a question.
"""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from adapter_store.catalog import Version
from adapter_store.ids import TenantId
from gateway.errors import AdapterNotLoadable
from gateway.replicas.client import CONTROL_ERRORS, AgentRefusedError, ReplicaClient, ResidentAdapter

log = logging.getLogger("tailor.residency")
Key = tuple[TenantId, str]
"""(tenant, digest): tenants never share an engine name, equal bytes or not."""


@dataclass(slots=True)
class Resident:
    """A version in the engine under its once-used name."""

    key: Key
    name: str
    version: Version | None
    last_used: float
    loaded_at: float = 0.0


class Residency:
    """One replica's adapters. Loads are single-flight per adapter and one at a time per replica."""

    def __init__(self, client: ReplicaClient, *, load_timeout_s: float) -> None:
        self._client = client
        self._load_timeout_s = load_timeout_s
        self._residents: dict[Key, Resident] = {}
        self._loading: dict[Key, asyncio.Task[Resident]] = {}
        self._reported: dict[str, Key] = {}
        self._waiting: Counter[Key] = Counter()
        self._turn = asyncio.Lock()

    def held(self, version: Version) -> Resident | None:
        """The resident, or None when it must be loaded first."""
        resident = self._residents.get((version.tenant_id, version.digest))
        if resident is not None:
            resident.last_used = time.time()
            resident.version = version
        return resident

    async def hold(self, version: Version) -> Resident:
        """The resident, loaded if it is cold. Its requests are counted by the agent, which waits for them.

        Raises:
            AdapterNotLoadable: the replica would not take it.
        """
        resident = self.held(version)
        if resident is not None:
            return resident
        key = (version.tenant_id, version.digest)
        loading = self._loading.get(key)
        if loading is None:
            loading = asyncio.create_task(self._load(key, version))
            self._loading[key] = loading
            loading.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may be left to ask
        self._waiting[key] += 1
        try:
            return await asyncio.shield(loading)  # a client that goes away must not stop the load for the others
        finally:
            self._waiting[key] -= 1
            if not self._waiting[key]:
                del self._waiting[key]

    async def _load(self, key: Key, version: Version) -> Resident:
        name = f"a-{secrets.token_hex(16)}"
        try:
            async with self._turn:
                if key not in self._waiting:
                    raise AdapterNotLoadable("Nobody waits for the adapter any more.", retry_after_s=1)
                report = await self._client.load(name, version, self._load_timeout_s)
        except CONTROL_ERRORS as error:
            log.warning("adapter %s of tenant %s not loaded: %r", version.digest, version.tenant_id, error)
            raise _not_loadable(error) from error
        finally:
            del self._loading[key]
        log.info(
            "adapter %s of tenant %s loaded as %s: fetch %.3f s, load %.3f s",
            version.digest, version.tenant_id, name, report.fetch_s, report.load_s,
        )  # fmt: skip
        resident = Resident(key, name, version, time.time(), loaded_at=time.monotonic())
        self._residents[key] = resident
        return resident

    def forget(self, resident: Resident) -> None:
        """The replica says that it does not know this name: the next request loads afresh."""
        if self._residents.get(resident.key) is resident:
            del self._residents[resident.key]

    def adopt(self, reported: Iterable[ResidentAdapter], *, asked_at: float) -> None:
        """Take the replica's report for the truth: drop what it lacks, learn what others loaded.

        `asked_at` (monotonic seconds) is when the report was asked for: what was loaded since may be missing in it.
        """
        known = {adapter.name: adapter for adapter in reported if adapter.tier != "disk"}
        self._reported = {
            name: (TenantId(adapter.owner), adapter.digest) for name, adapter in known.items() if adapter.owner
        }
        for resident in list(self._residents.values()):
            if resident.name not in known and resident.loaded_at < asked_at:
                self.forget(resident)
        for adapter in known.values():
            if adapter.owner:
                key = (TenantId(adapter.owner), adapter.digest)
                self._residents.setdefault(key, Resident(key, adapter.name, None, adapter.last_used))

    async def unload(self, tenant_id: TenantId, digests: Iterable[str]) -> None:
        """Take a tenant's deleted versions out of the replica; a failure is mended by the replica's own eviction."""
        for key in ((tenant_id, digest) for digest in digests):
            # two gateways that load one adapter at the same time give it two names
            names = {name for name, other in self._reported.items() if other == key}
            resident = self._residents.pop(key, None)
            if resident is not None:
                names.add(resident.name)
            for name in names:
                try:
                    await self._client.unload(name, self._load_timeout_s)
                except CONTROL_ERRORS as error:
                    log.warning("adapter %s not unloaded: %r", name, error)

    def start_over(self) -> list[Version]:
        """The engine is a new one: forget every name; returns what was held, the hottest first."""
        residents = sorted(self._residents.values(), key=lambda resident: resident.last_used, reverse=True)
        self._residents.clear()
        return [resident.version for resident in residents if resident.version is not None]


def _not_loadable(error: BaseException) -> AdapterNotLoadable:
    if isinstance(error, AgentRefusedError) and error.status == 503:
        return AdapterNotLoadable("The adapter waits for a free place; try again.", retry_after_s=1)
    if isinstance(error, AgentRefusedError) and error.status == 422:
        return AdapterNotLoadable(
            "The engine refused the adapter; publish it again or ask the operator.", retry_after_s=60
        )
    return AdapterNotLoadable("The adapter could not be loaded just now; try again.", retry_after_s=5)
