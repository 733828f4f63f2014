"""What happens to the server during a run, on the run's clock: each at its time, whatever became of the others."""

import asyncio
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from loadtests.api import ServerRefused, ServerUnreachable
from loadtests.children import WITH_PARENT, StackFailed
from loadtests.occurrences import Occurrence, occurrences, tenants_of
from loadtests.playing import Keys
from loadtests.preparing import Prepared
from loadtests.recording import Event
from loadtests.scenario import ActionKind, Scenario, ScenarioInvalid
from loadtests.stacks import Target
from loadtests.tenants import Adapter, Tenant, Version

NS: Final = 1_000_000_000
OVERLAP_S: Final = 5
"""How long a rotated key goes on: requests with it are under way."""
LOOK_S: Final = 0.25
ON_ADAPTERS: Final = (ActionKind.UPLOAD, ActionKind.PUBLISH, ActionKind.FLIP, ActionKind.DELETE)
ON_REPLICAS: Final = (
    ActionKind.KILL_REPLICA,
    ActionKind.STOP_REPLICA,
    ActionKind.SLOW_REPLICA,
    ActionKind.ROLLING_RESTART,
)
HEARD_NS: Final = NS
"""What one gateway of several was told, the others know within a second."""


def check(scenario: Scenario, target: Target) -> None:
    """Say before the run what cannot be done in it.

    Raises:
        ScenarioInvalid: the target cannot do an action, or an action has nobody to be done to.
    """
    faults = []
    groups = {group.name: group for group in scenario.tenants}
    for phase in scenario.phases:
        for action in phase.actions:
            if action.kind not in target.can:
                can = ", ".join(sorted(target.can))
                faults.append(f"{phase.name}: {action.kind} cannot be done to a target of kind {target.kind}: {can}")
            if action.tenants is not None and action.tenants not in groups:
                faults.append(f"{phase.name}: {action.kind}: no tenants {action.tenants}")
            concerned = [groups[action.tenants]] if action.tenants in groups else list(groups.values())
            if action.kind in ON_ADAPTERS and any(not group.adapters for group in concerned):
                faults.append(f"{phase.name}: {action.kind} asks for tenants that all have adapters")
            if (action.kind is ActionKind.COMMAND) != bool(action.command):
                faults.append(f"{phase.name}: {action.kind}: a command, and nothing else, has a `command`")
    if faults:
        raise ScenarioInvalid("; ".join(faults))


class NotDone(Exception):
    """An action that there was nothing to be done to, or no time for; the text says which."""


class Actions:
    """A run's actions; `events` grows while they happen."""

    def __init__(self, scenario: Scenario, target: Target, prepared: Prepared, keys: Keys) -> None:
        self._scenario, self._target, self._prepared, self._keys = scenario, target, prepared, keys
        self._api = prepared.api
        self._begin = 0
        self.began_at = ""
        """The wall clock's time of the run's begin, ISO 8601, UTC."""
        self._replicas: dict[str, str] = {}
        self.jobs: list[tuple[Tenant, str]] = []
        self.events: list[Event] = []

    async def run(self, begin_ns: int, over: asyncio.Event) -> None:
        """All of them; one that is due when the run is `over` is an error."""
        self._begin = begin_ns
        begin = datetime.now(UTC) + timedelta(microseconds=(begin_ns - time.monotonic_ns()) / 1e3)
        self.began_at = begin.isoformat(timespec="milliseconds")
        ended = asyncio.create_task(over.wait())
        tasks: list[asyncio.Task[None]] = []
        for one in occurrences(self._scenario):
            wait_s = (begin_ns + one.at_ns - time.monotonic_ns()) / NS  # `now` stands still until the begin
            if wait_s > 0:
                await asyncio.wait({ended}, timeout=wait_s)
            if over.is_set():
                self.events.append(Event(one.at_ns, str(one.action.kind), "", error="the run was over before it"))
            else:
                tasks.append(asyncio.create_task(self._do(one, ended)))
        await asyncio.gather(*tasks)
        ended.cancel()
        self.events.sort(key=lambda event: event.at)

    def now(self) -> int:
        """Since the run's begin, ns."""
        return max(0, time.monotonic_ns() - self._begin)

    async def watch(self, over: asyncio.Event) -> None:
        """Note when a replica's state is another one than before."""
        while not over.is_set():
            try:
                told = await self._api.call(self._target.operator_key, "GET", "/admin/v1/replicas")
            except (ServerRefused, ServerUnreachable):
                told = {"data": []}
            for replica in told["data"]:
                state, name = str(replica["state"]), str(replica["id"])
                if self._replicas.get(name, state) != state:
                    self.events.append(Event(self.now(), "replica-state", f"{name} {state}"))
                self._replicas[name] = state
            await asyncio.sleep(LOOK_S)

    async def _do(self, one: Occurrence, ended: asyncio.Task[Any]) -> None:
        begin = self.now()
        target, error = str(one.action.kind), ""
        try:
            target = await self._perform(one, ended)
        except (NotDone, ServerRefused, ServerUnreachable, StackFailed, OSError) as failed:
            error = str(failed)
        self.events.append(Event(begin, str(one.action.kind), target, self.now() - begin, error))

    async def _perform(self, one: Occurrence, ended: asyncio.Task[Any]) -> str:
        """Do it; what it was done to."""
        action = one.action
        if action.kind in ON_REPLICAS:
            await self._target.disturb(action)
            return "all replicas" if action.kind is ActionKind.ROLLING_RESTART else f"replica {action.replica}"
        if action.kind is ActionKind.COMMAND:
            return await self._command(action.command, ended)
        tenants = tenants_of(action, self._prepared.tenants)
        tenant = tenants[one.number % len(tenants)]
        if action.kind is ActionKind.ROTATE_KEY:
            return await self._rotate(tenant)
        if action.kind is ActionKind.TRAIN:
            return await self._train(tenant)
        adapter = one.adapter_of(tenant, len(tenants))
        on_adapter = {
            ActionKind.UPLOAD: self._upload,
            ActionKind.PUBLISH: self._publish,
            ActionKind.FLIP: self._flip,
            ActionKind.DELETE: self._delete,
        }
        return await on_adapter[action.kind](tenant, adapter)

    async def _upload(self, tenant: Tenant, adapter: Adapter) -> str:
        version = await self._prepared.publish(tenant, adapter, alias="")
        return _named(adapter, version)

    async def _publish(self, tenant: Tenant, adapter: Adapter) -> str:
        since = self.now()
        version = await self._prepared.publish(tenant, adapter)
        self._moved(adapter, version, since)
        return _named(adapter, version)

    async def _flip(self, tenant: Tenant, adapter: Adapter) -> str:
        """To the version before; from the first one to the next."""
        known = adapter.versions
        if not known:
            raise NotDone(f"{adapter.tenant}/{adapter.name} has no version to go to")
        at = known.index(adapter.current) if adapter.current in known else len(known)
        version = known[at - 1 if at > 0 else min(1, len(known) - 1)]
        since = self.now()
        body = {"versions": [{"version": version.number, "weight": 100}], "reason": "load test"}
        await self._api.call(tenant.key, "PUT", f"/v1/adapters/{adapter.name}/aliases/default", body)
        self._moved(adapter, version, since)
        return _named(adapter, version)

    async def _delete(self, tenant: Tenant, adapter: Adapter) -> str:
        if adapter.current is None:
            return f"{adapter.tenant}/{adapter.name} (gone already)"
        leaving = self.now()
        await self._api.call(tenant.key, "DELETE", f"/v1/adapters/{adapter.name}?force=true")
        self._prepared.lives.end(adapter, adapter.current.digest, self.now() + self._heard(), leaving=leaving)
        adapter.current = None
        adapter.versions.clear()
        return f"{adapter.tenant}/{adapter.name}"

    def _moved(self, adapter: Adapter, version: Version, since: int) -> None:
        """The name stands for another version; both may answer what runs while it moves."""
        old, adapter.current = adapter.current, version
        self._prepared.lives.begin(adapter, version, since)
        if old is not None and old.digest != version.digest:
            self._prepared.lives.end(adapter, old.digest, self.now() + self._heard())

    def _heard(self) -> int:
        """A stack of ours has one gateway, which knows at once what it has answered."""
        return HEARD_NS if self._target.kind == "url" else 0

    async def _rotate(self, tenant: Tenant) -> str:
        path = f"/admin/v1/keys/{tenant.key_id}/rotate"
        told = await self._api.call(self._target.operator_key, "POST", path, {"overlap_s": OVERLAP_S})
        tenant.key_id, tenant.key = str(told["id"]), str(told["secret"])
        self._keys.change(tenant.place, tenant.key)
        return tenant.name

    async def _train(self, tenant: Tenant) -> str:
        body: dict[str, Any] = {
            "model": self._prepared.base.name,
            "training_file": tenant.file,
            "suffix": "trained",
            "seed": 1,
            "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 1}}},
        }
        job = await self._api.call(tenant.key, "POST", "/v1/fine_tuning/jobs", body)
        self.jobs.append((tenant, str(job["id"])))
        return f"{tenant.name}/{job['id']}"

    async def _command(self, command: Sequence[str], ended: asyncio.Task[Any]) -> str:
        """It is killed, and those that it started, where it is still running when the run has `ended`."""
        process = await asyncio.create_subprocess_exec(
            *WITH_PARENT,
            *command,
            env={**os.environ, "TAILOR_URL": self._target.url},
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        words = asyncio.create_task(process.communicate())
        try:
            await asyncio.wait({words, ended}, return_when=asyncio.FIRST_COMPLETED)
            if not words.done():
                raise NotDone(f"{' '.join(command)}: it was still running when the run was over")
        finally:
            if not words.done():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        _, said = await words
        if process.returncode:
            raise StackFailed(f"exit {process.returncode}: {said.decode(errors='replace')[-300:]}")
        return " ".join(command)


def _named(adapter: Adapter, version: Version) -> str:
    return f"{adapter.tenant}/{adapter.name}@{version.number}"
