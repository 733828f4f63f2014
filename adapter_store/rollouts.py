"""Rollouts: an alias goes to another version step by step, and back by itself where that one does worse.

Every gateway counts what it sees of the two versions and keeps its counts in a row of its own; whichever looks next
judges the sums. A decision is one transaction that first makes sure that nobody else has taken it.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any, Final

from sqlalchemy import Row, Select, delete, insert, select, update

from adapter_store import aliases, catalog, proofs
from adapter_store.aliases import NOUN, MoveKind, NewMove
from adapter_store.catalog import rollout_counts, rollouts
from adapter_store.changes import record_change, take_turn
from adapter_store.engine import AsyncConnection, AsyncEngine
from adapter_store.errors import (
    AdapterNotFound,
    AliasNotFound,
    OtherBaseModel,
    RolloutInvalid,
    RolloutNotFound,
    RolloutOver,
    RolloutRunning,
)
from adapter_store.ids import AdapterId, TenantId, VersionId, new_rollout_id
from adapter_store.transactions import reading, writing

WHOLE: Final = 100
FASTEST_S: Final = 1e-4
GROWTH: Final = 1.2
BUCKETS: Final = 80  # up to 180 s
LEAST_ERRORS: Final = 3
LEAST_LATENCIES: Final = 30
SLOWER_S: Final = 0.02  # what is less than this is noise, whatever the ratio
Z: Final = 1.96
KEPT: Final = 100
"""Ended rollouts of one adapter that are kept."""


class Status(StrEnum):
    """Where a rollout is; all but RUNNING are final."""

    RUNNING = "running"
    COMPLETED = "completed"
    ROLLED_BACK = "rolled_back"
    CANCELLED = "cancelled"
    SUPERSEDED = "superseded"


@dataclass(frozen=True, slots=True)
class Policy:
    """How a rollout goes and when it goes back.

    `steps`: per cent of the traffic, rising to 100; each lasts `step_s` at least and until the new version has had
    `min_requests` in it. After `give_up_s` without them it goes back. The new version may fail more often than the old
    one by `max_error_increase` (0 to 1), and its latency's 90th percentile may be `max_latency_ratio` of the old one's.
    `needs_proof`: it also waits for the proof of effect and the comparison on the examples, as long as for requests,
    and goes back where either speaks against it.
    """

    steps: tuple[int, ...] = (5, 25, 50, 100)
    step_s: int = 60
    min_requests: int = 20
    give_up_s: int = 86_400
    max_error_increase: float = 0.01
    max_latency_ratio: float = 2.0
    needs_proof: bool = True

    def __post_init__(self) -> None:
        if not self.steps or list(self.steps) != sorted(set(self.steps)) or self.steps[-1] != WHOLE:
            raise RolloutInvalid("steps rise and end with 100 per cent, as in [5, 25, 100]")
        if self.steps[0] < 1:
            raise RolloutInvalid("a step is 1 to 100 per cent")


@dataclass(slots=True)
class Tally:
    """What was seen of one version: requests, those that failed, and a histogram of latencies."""

    requests: int = 0
    errors: int = 0
    latencies: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def note(self, *, failed: bool, latency_s: float | None) -> None:
        """One request; `latency_s` None: there is none to speak of."""
        self.requests += 1
        self.errors += failed
        if latency_s is not None and not failed:
            self.latencies[_bucket(latency_s)] += 1

    def add(self, other: "Tally") -> None:
        self.requests += other.requests
        self.errors += other.errors
        self.latencies = [mine + theirs for mine, theirs in zip(self.latencies, other.latencies, strict=True)]

    @property
    def error_rate(self) -> float:
        return self.errors / self.requests if self.requests else 0.0

    def latency_s(self, share: float) -> float | None:
        """The latency below which that share lies, to a fifth; None: too few to tell."""
        count = sum(self.latencies)
        if count < LEAST_LATENCIES:
            return None
        reached = 0
        for bucket, number in enumerate(self.latencies):
            reached += number
            if reached >= share * count:
                return FASTEST_S * GROWTH ** (bucket + 1)
        return None

    def encoded(self) -> str:
        return json.dumps([self.requests, self.errors, self.latencies])

    @classmethod
    def decoded(cls, text: str) -> "Tally":
        requests, errors, latencies = json.loads(text)
        return cls(requests, errors, latencies)


@dataclass(frozen=True, slots=True)
class Rollout:
    """One as its owner sees it; versions by number."""

    id: str
    tenant_id: TenantId
    adapter_id: AdapterId
    alias: str
    adapter_name: str
    baseline_id: VersionId
    baseline: int
    candidate_id: VersionId
    candidate: int
    policy: Policy
    status: Status
    reason: str
    step: int
    step_at: int
    step_requests: int
    started_by: str
    started_at: int
    ended_at: int | None

    @property
    def percent(self) -> int:
        """Of the alias's traffic that goes to the new version."""
        match self.status:
            case Status.RUNNING:
                return self.policy.steps[self.step]
            case Status.COMPLETED:
                return WHOLE
            case _:
                return 0


def judge(candidate: Tally, baseline: Tally, policy: Policy) -> str | None:
    """Why the candidate has to go; None: nothing speaks against it so far.

    Errors: the lower end of the 95 % confidence interval of its error rate (E. B. Wilson, JASA 22, 1927) is above what
    is allowed. So three failures of three are enough, and three of three hundred are not.
    """
    allowed = baseline.error_rate + policy.max_error_increase
    if candidate.errors >= LEAST_ERRORS and _wilson_low(candidate.errors, candidate.requests) > allowed:
        return (
            f"{candidate.errors} of {candidate.requests} requests failed, and {baseline.errors} of "
            f"{baseline.requests} on the version before"
        )
    slow, usual = candidate.latency_s(0.9), baseline.latency_s(0.9)
    if slow is None or usual is None:
        return None
    if slow > usual * policy.max_latency_ratio and slow - usual > SLOWER_S:
        return f"nine of ten answers came within {slow:.3g} s, and within {usual:.3g} s on the version before"
    return None


async def has_running(connection: AsyncConnection, version_id: VersionId) -> bool:
    """Whether a rollout to or from that version is under way."""
    its = (rollouts.c.candidate_id == version_id) | (rollouts.c.baseline_id == version_id)
    here = (rollouts.c.status == Status.RUNNING.value) & its
    return (await connection.execute(select(rollouts.c.id).where(here).limit(1))).one_or_none() is not None


def _wilson_low(count: int, total: int) -> float:
    rate = count / total
    spread = Z * math.sqrt(rate * (1 - rate) / total + Z * Z / (4 * total * total))
    return (rate + Z * Z / (2 * total) - spread) / (1 + Z * Z / total)


def _bucket(latency_s: float) -> int:
    if latency_s <= FASTEST_S:
        return 0
    return min(BUCKETS - 1, int(math.log(latency_s / FASTEST_S) / math.log(GROWTH)))


class Rollouts:
    """The rollouts of all tenants, and their counts."""

    def __init__(self, engine: AsyncEngine, base_fingerprint: str, *, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._base_fingerprint = base_fingerprint
        self._clock = clock

    async def start(
        self, tenant_id: TenantId, name: str, alias: str, number: int, policy: Policy, *, started_by: str
    ) -> Rollout:
        """Begin with the first step.

        Raises AdapterNotFound, AliasNotFound, OtherBaseModel, RolloutInvalid (the alias stands for that version),
        RolloutRunning (another is under way, or the alias stands for several versions).
        """
        began = self._clock()
        rollout_id, now = new_rollout_id(began), int(began)
        async with writing(self._engine) as connection:
            await record_change(connection, NOUN, tenant_id, name)
            if await catalog.find_adapter(connection, tenant_id, name) is None:
                raise AdapterNotFound(name)
            baseline = await aliases.find(connection, tenant_id, name, alias)
            candidate = await catalog.find_by_number(connection, tenant_id, name, number)
            if baseline is None:
                raise AliasNotFound(name, alias)
            if candidate is None:
                raise AdapterNotFound(f"{name}@{number}")
            if candidate.base_fingerprint != self._base_fingerprint:
                raise OtherBaseModel(f"'{name}@{number}' was made for another base model: train it again")
            if isinstance(baseline, aliases.Split) or baseline.rollout is not None:
                raise RolloutRunning(
                    f"alias '{alias}' stands for several versions or is on its way already: let it stand for one first"
                )
            if baseline.id == candidate.id:
                raise RolloutInvalid(f"alias '{alias}' stands for version {number} already")
            row = {
                "id": rollout_id,
                "tenant_id": tenant_id,
                "adapter_id": candidate.adapter_id,
                "alias": alias,
                "baseline_id": baseline.id,
                "baseline": baseline.number,
                "candidate_id": candidate.id,
                "candidate": candidate.number,
                "policy": json.dumps(asdict(policy)),
                "status": Status.RUNNING.value,
                "reason": "",
                "step": 0,
                "step_at": now,
                "step_requests": 0,
                "started_by": started_by,
                "started_at": now,
            }
            await connection.execute(insert(rollouts).values(row))
            await self._forget_old(connection, candidate.adapter_id)
            if policy.needs_proof:
                for version in (candidate, baseline):
                    await proofs.hasten(connection, version.id, now)
            rollout = await self._find(connection, rollout_id)
            assert rollout is not None
            await self._point(connection, rollout, policy.steps[0], f"rollout to {policy.steps[0]} %", started_by)
        return rollout

    async def show(self, tenant_id: TenantId, name: str, rollout_id: str) -> tuple[Rollout, Tally, Tally]:
        """It, and what was seen of its new and its old version. Raises AdapterNotFound, RolloutNotFound."""
        async with reading(self._engine) as connection:
            rollout = await self._own(connection, tenant_id, name, rollout_id)
            return rollout, *await self._tallies(connection, rollout)

    async def list(self, tenant_id: TenantId, name: str, *, limit: int = KEPT) -> tuple[Rollout, ...]:
        """An adapter's, the newest first. Raises AdapterNotFound."""
        async with reading(self._engine) as connection:
            row = await catalog.find_adapter(connection, tenant_id, name)
            if row is None:
                raise AdapterNotFound(name)
            statement = (
                _select()
                .where(rollouts.c.adapter_id == row.id)
                .order_by(rollouts.c.started_at.desc(), rollouts.c.id.desc())
                .limit(limit)
            )
            return tuple(_rollout(found) for found in await connection.execute(statement))

    async def running(self) -> tuple[Rollout, ...]:
        """Of all tenants: what gateways look after."""
        async with reading(self._engine) as connection:
            statement = _select().where(rollouts.c.status == Status.RUNNING.value)
            return tuple(_rollout(found) for found in await connection.execute(statement))

    async def cancel(self, tenant_id: TenantId, name: str, rollout_id: str, *, by: str, reason: str = "") -> Rollout:
        """Back to the old version. Raises AdapterNotFound, RolloutNotFound, RolloutOver."""
        async with writing(self._engine) as connection:
            await record_change(connection, NOUN, tenant_id, name)
            rollout = await self._own(connection, tenant_id, name, rollout_id)
            if rollout.status is not Status.RUNNING:
                raise RolloutOver(f"the rollout has ended: it is {rollout.status.value}")
            await self._end(connection, rollout, Status.CANCELLED, reason[: aliases.MOST_REASON] or "cancelled", by)
            found = await self._find(connection, rollout_id)
            assert found is not None
            return found

    async def keep(self, gateway: str, tallies: Mapping[tuple[str, VersionId], Tally]) -> None:
        """Write down what this gateway has seen since each rollout began, by (rollout, version)."""
        async with writing(self._engine) as connection:
            await take_turn(connection)
            for (rollout_id, version_id), tally in tallies.items():
                here = (
                    (rollout_counts.c.rollout_id == rollout_id)
                    & (rollout_counts.c.version_id == version_id)
                    & (rollout_counts.c.gateway == gateway)
                )
                changed = await connection.execute(update(rollout_counts).where(here).values(tally=tally.encoded()))
                if not changed.rowcount and await self._find(connection, rollout_id) is not None:
                    row = {"rollout_id": rollout_id, "version_id": version_id, "gateway": gateway}
                    await connection.execute(insert(rollout_counts).values(**row, tally=tally.encoded()))

    async def advance(self, rollout: Rollout, *, proof: str | None = None, remark: str = "") -> Rollout | None:
        """Take the decision that is due on a running one; None: there is none.

        `proof`: "proved", or what else the new version's proof has come to; None: it, or the comparison, is to come.
        `remark`: what the history says of the comparison with the old version where it completes.
        """
        async with reading(self._engine) as connection:
            candidate, baseline = await self._tallies(connection, rollout)
        decided = self._decide(rollout, candidate, baseline, proof, remark)
        if decided is None:
            return None
        status, reason = decided
        async with writing(self._engine) as connection:
            await record_change(connection, NOUN, rollout.tenant_id, rollout.adapter_name)
            now = await self._find(connection, rollout.id)
            if now is None or now.status is not Status.RUNNING or now.step != rollout.step:
                return None  # somebody else was faster
            if status is Status.RUNNING:
                await self._step(connection, rollout, candidate.requests)
            else:
                await self._end(connection, rollout, status, reason, "")
            return await self._find(connection, rollout.id)

    def _decide(
        self, rollout: Rollout, candidate: Tally, baseline: Tally, proof: str | None, remark: str
    ) -> tuple[Status, str] | None:
        policy = rollout.policy
        reason = judge(candidate, baseline, policy)
        if reason is None and policy.needs_proof and proof not in (None, "proved"):
            reason = f"the proof of version {rollout.candidate} says: {proof}"
        if reason is not None:
            return Status.ROLLED_BACK, reason
        lasted_s = self._clock() - rollout.step_at
        missing = None
        if candidate.requests - rollout.step_requests < policy.min_requests:
            missing = f"fewer than {policy.min_requests} requests came"
        elif policy.needs_proof and proof is None:
            missing = "no proof, or no comparison with the version before on the examples, came"
        if missing is not None:
            return None if lasted_s < policy.give_up_s else (Status.ROLLED_BACK, f"{missing} in {policy.give_up_s} s")
        if lasted_s < policy.step_s:
            return None
        if rollout.step + 1 == len(policy.steps):
            return Status.COMPLETED, remark
        return Status.RUNNING, ""

    async def _step(self, connection: AsyncConnection, rollout: Rollout, requests: int) -> None:
        step = rollout.step + 1
        values = {"step": step, "step_at": int(self._clock()), "step_requests": requests}
        await connection.execute(update(rollouts).where(rollouts.c.id == rollout.id).values(**values))
        percent = rollout.policy.steps[step]
        await self._point(connection, rollout, percent, f"rollout to {percent} %", "")

    async def _end(self, connection: AsyncConnection, rollout: Rollout, status: Status, reason: str, by: str) -> None:
        values = {"status": status.value, "reason": reason, "ended_at": int(self._clock())}
        await connection.execute(update(rollouts).where(rollouts.c.id == rollout.id).values(**values))
        percent = WHOLE if status is Status.COMPLETED else 0
        told = f"rollout {status.value.replace('_', ' ')}{': ' if reason else ''}{reason}"
        await self._point(connection, rollout, percent, told[: aliases.MOST_REASON], by, is_over=True)

    async def _point(
        self,
        connection: AsyncConnection,
        rollout: Rollout,
        percent: int,
        reason: str,
        by: str,
        *,
        is_over: bool = False,
    ) -> None:
        both = (
            (rollout.baseline_id, rollout.baseline, WHOLE - percent),
            (rollout.candidate_id, rollout.candidate, percent),
        )
        target = [share for share in both if share[2]]
        goes_back = is_over and not percent
        move = NewMove(
            rollout.adapter_id,
            rollout.alias,
            MoveKind.ROLLBACK if goes_back else MoveKind.ROLLOUT,
            by,
            reason,
            int(self._clock()),
            None if is_over else rollout.id,
        )
        await aliases.point(connection, move, target)

    async def _own(self, connection: AsyncConnection, tenant_id: TenantId, name: str, rollout_id: str) -> Rollout:
        row = await catalog.find_adapter(connection, tenant_id, name)
        if row is None:
            raise AdapterNotFound(name)
        rollout = await self._find(connection, rollout_id)
        if rollout is None or rollout.adapter_id != row.id:
            raise RolloutNotFound(rollout_id)
        return rollout

    async def _find(self, connection: AsyncConnection, rollout_id: str) -> Rollout | None:
        row = (await connection.execute(_select().where(rollouts.c.id == rollout_id))).one_or_none()
        return None if row is None else _rollout(row)

    async def _tallies(self, connection: AsyncConnection, rollout: Rollout) -> tuple[Tally, Tally]:
        sums = {rollout.candidate_id: Tally(), rollout.baseline_id: Tally()}
        columns = (rollout_counts.c.version_id, rollout_counts.c.tally)
        for row in await connection.execute(select(*columns).where(rollout_counts.c.rollout_id == rollout.id)):
            if row.version_id in sums:
                sums[row.version_id].add(Tally.decoded(row.tally))
        return sums[rollout.candidate_id], sums[rollout.baseline_id]

    async def _forget_old(self, connection: AsyncConnection, adapter_id: AdapterId) -> None:
        statement = (
            select(rollouts.c.id)
            .where(rollouts.c.adapter_id == adapter_id)
            .order_by(rollouts.c.started_at.desc(), rollouts.c.id.desc())
            .offset(KEPT)
        )
        old: Sequence[str] = (await connection.execute(statement)).scalars().all()
        if old:
            await connection.execute(delete(rollout_counts).where(rollout_counts.c.rollout_id.in_(old)))
            await connection.execute(delete(rollouts).where(rollouts.c.id.in_(old)))


def _select() -> Select[Any]:
    return select(rollouts, catalog.adapters.c.name.label("adapter_name")).join(
        catalog.adapters, catalog.adapters.c.id == rollouts.c.adapter_id
    )


def _rollout(row: Row[Any]) -> Rollout:
    policy = json.loads(row.policy)
    return Rollout(
        id=row.id,
        tenant_id=TenantId(row.tenant_id),
        adapter_id=AdapterId(row.adapter_id),
        alias=row.alias,
        adapter_name=row.adapter_name,
        baseline_id=VersionId(row.baseline_id),
        baseline=row.baseline,
        candidate_id=VersionId(row.candidate_id),
        candidate=row.candidate,
        policy=Policy(**{**policy, "steps": tuple(policy["steps"])}),
        status=Status(row.status),
        reason=row.reason,
        step=row.step,
        step_at=row.step_at,
        step_requests=row.step_requests,
        started_by=row.started_by,
        started_at=row.started_at,
        ended_at=row.ended_at,
    )
