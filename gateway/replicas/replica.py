"""One replica as the gateway sees it: its state, its legal transitions, and how it is watched."""

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from typing import Final

from adapter_store.catalog import Version
from adapter_store.ids import TenantId
from gateway.errors import GatewayError
from gateway.fairness import FairGate, GateLimits, VirtualTokenCounters
from gateway.open_set import Key, OpenSet
from gateway.quarantine import Quarantine
from gateway.replicas.breaker import Breaker
from gateway.replicas.client import CONTROL_ERRORS, Alarm, EngineFacts, ReplicaClient, ReplicaReport
from gateway.replicas.holdings import Resident
from gateway.replicas.residency import Residency
from gateway.replicas.roster import replica_id
from gateway.replicas.turns import Turns
from gateway.replicas.unheard import Unheard
from gateway.replicas.upstream import OutOfDescriptorsError

log = logging.getLogger("tailor.replica")
DEATH_EVERY_S: Final = 10.0
"""A death within so long of the last one is none that `died_at` tells of: the replica comes and goes."""
ALIVE_S: Final = 1.0
"""Tokens heard in the last second of a look that failed say that the engine is busy, not frozen."""
UNKNOWN_CONCURRENCY: Final = 256
UNKNOWN_SLOTS: Final = 4


class ReplicaState(Enum):
    """Where a replica stands; only READY takes requests."""

    UNREACHABLE = "unreachable"
    RESTORING = "restoring"
    READY = "ready"
    TRIPPED = "tripped"
    DRAINING = "draining"
    MISMATCHED = "mismatched"


TRANSITIONS: Final = {
    ReplicaState.UNREACHABLE: {ReplicaState.RESTORING, ReplicaState.MISMATCHED},
    ReplicaState.RESTORING: {ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.UNREACHABLE},
    ReplicaState.READY: {ReplicaState.TRIPPED, ReplicaState.DRAINING, ReplicaState.UNREACHABLE},
    ReplicaState.TRIPPED: {ReplicaState.READY, ReplicaState.DRAINING, ReplicaState.UNREACHABLE},
    ReplicaState.DRAINING: {ReplicaState.READY, ReplicaState.UNREACHABLE},
    ReplicaState.MISMATCHED: {ReplicaState.UNREACHABLE},
}
SERVING: Final = frozenset({ReplicaState.READY, ReplicaState.TRIPPED, ReplicaState.DRAINING})
"""Requests may be running there."""


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    """How replicas are watched and shared; `concurrency` None: what the engine says (its `max_num_seqs`)."""

    load_timeout_s: float = 60.0
    probe_interval_s: float = 1.0
    probe_deadline_s: float = 3.0
    concurrency: int | None = None
    quantum_s: float = 1.0
    queue: int = 1_024
    tenant_queue: int = 256
    queue_timeout_s: float = 30.0
    fair: bool = True


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
        options: ReplicaOptions,
        counters: VirtualTokenCounters,
        on_change: Callable[[], None] = lambda: None,
        on_loaded: Callable[["Replica", Resident], None] = lambda _, __: None,
        quarantine: Quarantine | None = None,
    ) -> None:
        self.url = client.upstream.url
        self.id = replica_id(self.url)
        self.client = client
        self.unheard = Unheard(client)
        self._look_now = asyncio.Event()
        self.residency = Residency(
            client,
            load_timeout_s=options.load_timeout_s,
            quarantine=quarantine,
            on_loaded=lambda resident: on_loaded(self, resident),
            on_ending=self._look_now.set,
        )
        self.holdings = self.residency.holdings
        self.state = ReplicaState.UNREACHABLE
        self.report: ReplicaReport | None = None
        self.died_at = -math.inf
        """When it was last lost while it had requests (monotonic seconds), at most once in `DEATH_EVERY_S`."""
        self.drain_wanted = False
        self.breaker = Breaker(time.monotonic)
        self.gate = _gate(options, counters)
        self.turns = Turns(self.gate)
        self.recycles = 0
        self.pins: Mapping[Key, Version] = {}
        self._pins_told: tuple[str, Mapping[Key, Version]] = ("", {})
        self._quarantine = quarantine
        self._recycled = ""
        self._corrupted = 0
        self._options = options
        self._fingerprint = fingerprint
        self._on_change = on_change
        self._last_reason = ""

    # what the hot path reads

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together; known once the replica has been ready."""
        return self.report.engine.max_model_len if self.report is not None else 1 << 31

    @property
    def vocabulary(self) -> int:
        """How many ids of tokens there are; known likewise."""
        return self.report.engine.vocab_size if self.report is not None else 1 << 31

    @property
    def base_name(self) -> str:
        """What the engine calls its base model, which need not be what tenants call it."""
        return self.report.base_model.name if self.report is not None else ""

    @property
    def null_adapter(self) -> str | None:
        return self.report.null_adapter if self.report is not None else None

    @property
    def corrupted_requests(self) -> int:
        """Requests whose logits were not finite, as far as their engine said so before its end."""
        return self._corrupted

    # what routing reads

    @property
    def takes_requests(self) -> bool:
        return self.state is ReplicaState.READY and (not self.breaker.on_trial or self.gate.load < self.breaker.trials)

    @property
    def load(self) -> int:
        return self.gate.in_flight + self.gate.waiting

    @property
    def concurrency(self) -> int:
        return self.gate.limits.concurrency

    @property
    def slots(self) -> int:
        return self.report.engine.max_loras if self.report is not None else UNKNOWN_SLOTS

    def holds(self, adapter: object) -> bool:
        return adapter in self.holdings.by_key

    def has_place(self, adapter: Key) -> bool:
        return self.gate.has_place(adapter)

    # what requests tell

    def succeeded(self) -> None:
        """A request was answered."""
        self.breaker.succeeded()

    def failed(self, tenant: str = "") -> None:
        """The replica failed on a tenant's request (5xx, a broken answer); too many, and it rests."""
        if self.breaker.failed(tenant) and self.state is ReplicaState.READY:
            self._rest()
        self._look_now.set()

    def answered_elsewhere(self) -> None:
        """Another replica has answered what this one failed on."""
        if self.state is ReplicaState.READY and self.breaker.answered_elsewhere():
            self._rest()

    def _rest(self) -> None:
        self.breaker.trip()
        self._tell("too many of its answers failed")
        self._become(ReplicaState.TRIPPED)

    def suspect(self) -> None:
        """A request found the replica gone: no further one goes there before it has proved itself."""
        self._become(ReplicaState.UNREACHABLE)
        self._look_now.set()

    # what operators tell

    def drain(self) -> None:
        """No further request comes here; those that run end in their own time."""
        self.drain_wanted = True
        if ReplicaState.DRAINING in TRANSITIONS[self.state] and self.state is not ReplicaState.RESTORING:
            self._become(ReplicaState.DRAINING)

    def resume(self) -> None:
        """Take requests again."""
        self.drain_wanted = False
        if self.state is ReplicaState.DRAINING:
            self._become(ReplicaState.READY)

    @property
    def is_drained(self) -> bool:
        """Whether nothing runs here any more, whichever gateway sent it; others' requests as of the last look."""
        others = self.report.in_flight if self.report is not None and self.state is ReplicaState.DRAINING else 0
        return self.drain_wanted and not self.load and not others

    async def watch(self) -> None:
        """Look at the replica for ever; meant to run as one task."""
        while True:
            self._look_now.clear()
            again_at_once = False
            try:
                again_at_once = await self._look()
            except Exception:  # the watch must outlive any one look
                log.exception("replica %s cannot be judged", self.id)
                self._become(ReplicaState.UNREACHABLE)
            if again_at_once:
                continue
            try:
                async with asyncio.timeout(self._options.probe_interval_s):
                    await self._look_now.wait()
                await asyncio.sleep(self._options.probe_interval_s / 10)  # a storm of suspicions is one look
            except TimeoutError:
                pass

    async def _look(self) -> bool:
        """Judge the replica anew; True where it must be looked at again at once."""
        asked_at = time.monotonic()
        opened = self._open_keys()
        try:
            report = await self.client.look(self._options.probe_deadline_s)
        except OutOfDescriptorsError:
            log.error("replica %s cannot be looked at: this gateway has no descriptor left", self.id)
            return False
        except CONTROL_ERRORS as error:
            return self._note_silence(error, asked_at)
        if report.base_model.fingerprint != self._fingerprint:
            if self.state is not ReplicaState.MISMATCHED:
                self._tell("it serves another base model")
                self._become(ReplicaState.UNREACHABLE)
                self._become(ReplicaState.MISMATCHED)
            return False
        fresh = self.report is None or self.report.generation != report.generation
        if report.alarm is not None:
            await self._recycle(report, report.alarm)
            return False
        self.report = report
        self._fit_gate(report, opened | self._open_keys())
        if fresh:
            self._become(ReplicaState.UNREACHABLE)
            await self._restore(report, asked_at)
        else:
            self.residency.adopt(report.adapters, asked_at=asked_at)
        await self._tell_pins(report.generation)
        self._note_health()
        return False

    async def _tell_pins(self, generation: str) -> None:
        """A new engine knows of no pins, and none is what most have."""
        pins = self.pins
        if self._pins_told == (generation, pins) or (not pins and not self._pins_told[1]):
            return
        try:
            await self.client.pin(pins, self._options.probe_deadline_s)
        except CONTROL_ERRORS as error:
            log.warning("replica %s does not know what is pinned: %r", self.id, error)
        else:
            self._pins_told = (generation, pins)

    async def _recycle(self, report: ReplicaReport, alarm: Alarm) -> None:
        """An engine that has died or computed NaN is started again; its suspect is held back before it is back."""
        self._heed(alarm)
        if self._recycled == alarm.generation:
            return
        self._recycled = alarm.generation
        self.recycles += 1
        if alarm.reason == "corrupted":
            self._corrupted += max(1, report.corrupted_requests)  # vLLM counts those that have ended
        self._tell(f"its engine ends: {alarm.reason}")
        self.client.upstream.close()  # whatever it still computes may be wrong
        self._become(ReplicaState.UNREACHABLE)
        try:
            await self.client.recycle(report.generation, self._options.probe_deadline_s)
        except CONTROL_ERRORS as error:
            log.warning("replica %s ends by itself: %r", self.id, error)

    def _heed(self, alarm: Alarm) -> None:
        if self._quarantine is not None:
            self._quarantine.accuse(alarm, self.id)

    def _note_silence(self, error: BaseException, asked_at: float) -> bool:
        serving = self.state in (ReplicaState.READY, ReplicaState.DRAINING)
        if serving and self.client.upstream.heard_since(max(asked_at, time.monotonic() - ALIVE_S)):
            return True  # it is busy, not frozen: tokens of others came just now
        self._tell(repr(error))
        if serving:
            self.client.upstream.close()  # streams on it end in an error now, not after the client's patience
        self._become(ReplicaState.UNREACHABLE)
        return False

    def _note_health(self) -> None:
        """The engine has given a token."""
        if self.state is ReplicaState.TRIPPED:
            if not self.breaker.has_rested():
                return
            self.breaker.try_again()
            self._become(ReplicaState.READY)
        if self.state in (ReplicaState.READY, ReplicaState.DRAINING):
            return
        self._become(ReplicaState.RESTORING)
        self._become(ReplicaState.DRAINING if self.drain_wanted else ReplicaState.READY)
        self._last_reason = ""
        assert self.report is not None
        log.info("replica %s is %s, generation %s", self.id, self.state.value, self.report.generation)

    def _fit_gate(self, report: ReplicaReport, mine: set[Key]) -> None:
        """Take the engine's own bounds for the gate's, less what other gateways use of its adapter slots."""
        facts: EngineFacts = report.engine
        concurrency = self._options.concurrency or facts.max_num_seqs
        if concurrency != self.gate.limits.concurrency:
            self.gate.limits = replace(self.gate.limits, concurrency=concurrency)
        if self.gate.open_set is None:
            return
        if self.report is None or self.state is not ReplicaState.READY:
            self.gate.open_set.limit = facts.max_loras
            return
        others = {
            (TenantId(adapter.owner), adapter.digest)
            for adapter in report.adapters
            if adapter.in_flight and adapter.owner
        } - mine
        before = self.gate.open_set.limit
        self.gate.open_set.share(facts.max_loras, len(others))
        if self.gate.open_set.limit != before:
            self.gate.rotate()
            self.turns.arm()

    def _open_keys(self) -> set[Key]:
        return set(self.gate.open_set.keys()) if self.gate.open_set is not None else set()

    async def _restore(self, report: ReplicaReport, asked_at: float) -> None:
        """Bring back what a restarted engine has forgotten, pinned adapters and then the hottest first, before it takes
        requests.

        As many as the device holds, within the time of one load; the rest is loaded when it is asked for.
        """
        self._become(ReplicaState.RESTORING)
        held = self.residency.start_over()
        held.sort(key=lambda version: (version.tenant_id, version.digest) not in self.pins)
        if report.last_alarm is not None:
            self._heed(report.last_alarm)
            held = _without_suspects(held, report.last_alarm)
        self.residency.adopt(report.adapters, asked_at=asked_at)
        with suppress(TimeoutError):
            async with asyncio.timeout(self._options.load_timeout_s):
                for version in held[: report.engine.max_loras]:
                    await self._restore_one(version)

    async def _restore_one(self, version: Version) -> None:
        try:
            await self.residency.hold(version, patient=False)
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
        if state is ReplicaState.UNREACHABLE and self.state in SERVING:
            self._note_death()
        self.state = state
        self._on_change()
        if state is not ReplicaState.READY:
            self.turns.turn_away()
        if state in (ReplicaState.UNREACHABLE, ReplicaState.TRIPPED):
            self.residency.abandon()

    def _note_death(self) -> None:
        now = time.monotonic()
        if now - self.died_at >= DEATH_EVERY_S:
            self.died_at = now


def _without_suspects(held: list[Version], alarm: Alarm) -> list[Version]:
    """Who may have ended the engine is loaded only when it is asked for, which tells suspects apart."""
    suspects = {(suspect.owner, suspect.digest) for suspect in alarm.suspects}
    return [version for version in held if (version.tenant_id, version.digest) not in suspects]


def _gate(options: ReplicaOptions, counters: VirtualTokenCounters) -> FairGate:
    open_set = (
        OpenSet(UNKNOWN_SLOTS, options.quantum_s, time.monotonic, by_tenant=options.fair) if options.quantum_s else None
    )
    limits = GateLimits(
        options.concurrency or UNKNOWN_CONCURRENCY,
        tenant_queue=options.tenant_queue,
        queue=options.queue,
        fair=options.fair,
    )
    return FairGate(limits, counters, open_set, time.monotonic)
