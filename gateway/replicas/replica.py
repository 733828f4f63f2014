"""One replica as the gateway sees it: its state, its legal transitions, and how it is watched."""

import asyncio
import logging
import time
from contextlib import suppress
from enum import Enum
from typing import Final

from adapter_store.catalog import Version
from gateway.errors import GatewayError
from gateway.replicas.client import CONTROL_ERRORS, ReplicaClient, ReplicaReport
from gateway.replicas.residency import Residency
from gateway.replicas.upstream import OutOfDescriptorsError

log = logging.getLogger("tailor.replica")


class ReplicaState(Enum):
    """Where a replica stands; only READY takes requests."""

    UNREACHABLE = "unreachable"
    RESTORING = "restoring"
    READY = "ready"
    MISMATCHED = "mismatched"


TRANSITIONS: Final = {
    ReplicaState.UNREACHABLE: {ReplicaState.RESTORING, ReplicaState.MISMATCHED},
    ReplicaState.RESTORING: {ReplicaState.READY, ReplicaState.UNREACHABLE},
    ReplicaState.READY: {ReplicaState.UNREACHABLE},
    ReplicaState.MISMATCHED: {ReplicaState.UNREACHABLE},
}


class Replica:
    """A vLLM with our agent in it.

    `watch` keeps the state true: a replica is ready when its engine gives a real token in time, and after a restart
    only once the adapters that were hot are back.
    """

    def __init__(
        self,
        client: ReplicaClient,
        *,
        fingerprint: str,
        load_timeout_s: float,
        probe_interval_s: float,
        probe_deadline_s: float,
    ) -> None:
        self.id = client.upstream.url
        self.client = client
        self.residency = Residency(client, load_timeout_s=load_timeout_s)
        self.state = ReplicaState.UNREACHABLE
        self.report: ReplicaReport | None = None
        self._fingerprint = fingerprint
        self._probe_interval_s = probe_interval_s
        self._probe_deadline_s = probe_deadline_s
        self._load_timeout_s = load_timeout_s
        self._look_now = asyncio.Event()
        self._last_reason = ""

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together; known once the replica has been ready."""
        return self.report.engine.max_model_len if self.report is not None else 1 << 31

    @property
    def base_name(self) -> str:
        """What the engine calls its base model, which need not be what tenants call it."""
        return self.report.base_model.name if self.report is not None else ""

    @property
    def null_adapter(self) -> str | None:
        return self.report.null_adapter if self.report is not None else None

    def suspect(self) -> None:
        """A request found the replica gone: no further one goes there before it has proved itself."""
        self._become(ReplicaState.UNREACHABLE)
        self._look_now.set()

    def look_soon(self) -> None:
        """Something is odd about the replica: do not wait for the next look."""
        self._look_now.set()

    async def watch(self) -> None:
        """Look at the replica for ever; meant to run as one task."""
        while True:
            self._look_now.clear()
            try:
                await self._look()
            except Exception:  # the watch must outlive any one look
                log.exception("replica %s cannot be judged", self.id)
                self._become(ReplicaState.UNREACHABLE)
            try:
                async with asyncio.timeout(self._probe_interval_s):
                    await self._look_now.wait()
                await asyncio.sleep(self._probe_interval_s / 10)  # a storm of suspicions is one look
            except TimeoutError:
                pass

    async def _look(self) -> None:
        asked_at = time.monotonic()
        try:
            report, _ = await asyncio.gather(
                self.client.state(self._probe_deadline_s), self.client.probe(self._probe_deadline_s)
            )
        except OutOfDescriptorsError:
            log.error("replica %s cannot be looked at: this gateway has no descriptor left", self.id)
            return
        except CONTROL_ERRORS as error:
            if self.state is ReplicaState.READY and self.client.upstream.heard_since(asked_at):
                return  # it is busy, not frozen: tokens of others came meanwhile
            self._tell(repr(error))
            if self.state is ReplicaState.READY:
                self.client.upstream.close()  # streams on it end in an error now, not after the client's patience
            self._become(ReplicaState.UNREACHABLE)
            return
        if report.base_model.fingerprint != self._fingerprint:
            if self.state is not ReplicaState.MISMATCHED:
                self._tell("it serves another base model")
                self._become(ReplicaState.UNREACHABLE)
                self._become(ReplicaState.MISMATCHED)
            return
        fresh = self.report is None or self.report.generation != report.generation
        self.report = report
        if fresh:
            self._become(ReplicaState.UNREACHABLE)
            await self._restore(report, asked_at)
        else:
            self.residency.adopt(report.adapters, asked_at=asked_at)
        if self.state is not ReplicaState.READY:
            self._become(ReplicaState.RESTORING)
            self._become(ReplicaState.READY)
            self._last_reason = ""
            log.info("replica %s is ready, generation %s", self.id, report.generation)

    async def _restore(self, report: ReplicaReport, asked_at: float) -> None:
        """Bring back what a restarted engine has forgotten, the hottest first, before it takes requests.

        As many as the device holds, within the time of one load; the rest is loaded when it is asked for.
        """
        self._become(ReplicaState.RESTORING)
        held = self.residency.start_over()
        self.residency.adopt(report.adapters, asked_at=asked_at)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._load_timeout_s):
                for version in held[: report.engine.max_loras]:
                    await self._restore_one(version)

    async def _restore_one(self, version: Version) -> None:
        try:
            await self.residency.hold(version)
        except GatewayError as error:
            log.warning("adapter %s not restored: %s", version.digest, error)

    def _tell(self, reason: str) -> None:
        """Say once why the replica gets no requests."""
        if reason != self._last_reason:
            log.warning("replica %s gets no requests: %s", self.id, reason)
        self._last_reason = reason

    def _become(self, state: ReplicaState) -> None:
        if state is self.state:
            return
        if state not in TRANSITIONS[self.state]:
            raise AssertionError(f"a replica cannot go from {self.state} to {state}")
        self.state = state
