"""Limits counted in Redis, for all gateways together.

An admission is one call of a script; those that come while one is on its way travel together in the next. Settlements
are written behind, a batch every few milliseconds.

Redis away, or slower than the deadline: nobody waits for it any more. This gateway counts in memory, with the same
limits, until Redis answers again; what was admitted here or there is settled where it was admitted. So while Redis is
away a tenant can use at most its limits once per gateway, beside what was running already.
"""

import asyncio
import itertools
import logging
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from adapter_store.ids import TenantId
from gateway.limits import UNLIMITED, Admission, MonthReader, scripts
from gateway.limits.memory import LEARN_AGAIN_S, MemoryLimits
from gateway.limits.terms import SLACK, KnownTerms, Terms, month_of
from gateway.plans import Plan

log = logging.getLogger("tailor.limits")
LEASE_S: Final = 60.0  # a dead gateway's requests count as running for so long
SETTLE_WITHIN_S: Final = 600.0  # a settlement that comes later changes nothing
KEPT_S: Final = 86_400  # an idle tenant's counters; the month is then read from the database again
BATCH_S: Final = 0.02
BATCH: Final = 500
PROBE_S: Final = 1.0
QUEUE_LIMIT: Final = 100_000
MOST_REFUSED: Final = 10_000
KNOWN_S: Final[Mapping[bytes, float]] = {b"rate": 1.0, b"month": 1.0, b"running": 0.2}
"""For how long a refusal tells of tokens and places, by its verdict: requests that end elsewhere give some back."""
FAILURES: Final = (RedisError, OSError, TimeoutError)


class RedisLimits:
    """`degraded` while counting in memory; `outages` and `dropped` settlements are counted."""

    def __init__(
        self,
        url: str,
        memory: MemoryLimits,
        *,
        used_this_month: MonthReader,
        timeout_s: float,
        lease_s: float = LEASE_S,
        settle_within_s: float = SETTLE_WITHIN_S,
        probe_s: float = PROBE_S,
        known_s: Mapping[bytes, float] = KNOWN_S,
    ) -> None:
        self.degraded = False
        self.outages = 0
        self.dropped = 0
        self._url = url
        self._memory = memory
        self._used_this_month = used_this_month
        self._timeout_s = timeout_s
        self._lease_s = lease_s
        self._settle_within_s = settle_within_s
        self._probe_s = probe_s
        self._known_s = known_s
        self._terms = KnownTerms()
        self._name = secrets.token_hex(6)
        self._numbers = itertools.count(1)
        self._link = Link(url, timeout_s)
        self._asked: list[Call] = []  # waiting for the next flight
        self._ask_event = asyncio.Event()
        self._written: deque[Call] = deque()  # to be written behind, in order
        self._write_event = asyncio.Event()
        self._writing = asyncio.Lock()
        self._alone: dict[TenantId, tuple[int, float]] = {}  # counted in memory: tokens of the month, since when
        self._running: dict[str, TenantId] = {}  # leases to be renewed
        self._refused: dict[TenantId, Refused] = {}
        self._learning: dict[TenantId, asyncio.Task[bool]] = {}
        self._learn_at: dict[TenantId, float] = {}
        self._ahead_s = 0.0  # Redis's clock minus ours
        self._returning: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        memory.on_settled = self._note_alone

    async def start(self) -> None:
        """Connects; where Redis is away, the gateway starts all the same."""
        await self._memory.start()
        try:
            await self._link.open()
        except FAILURES as error:
            self._degrade(error)
        self._tasks = [
            asyncio.create_task(work) for work in (self._ask_for_ever(), self._write_behind(), self._renew())
        ]

    async def close(self) -> None:
        """Writes what is still to be settled, if Redis takes it in time."""
        tasks = [*self._tasks, *self._learning.values(), *([self._returning] if self._returning else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._let_go(self._asked)
        if not self.degraded:
            await self._write_all()
        await self._link.close()
        await self._memory.close()

    @property
    def unsettled(self) -> int:
        """How many messages Redis does not have yet."""
        return len(self._written) + len(self._alone)

    def hold_off(self, tenant_id: TenantId, plan: Plan, tokens: int) -> None:
        """As in `Limits`, by what Redis said when it last refused the tenant, as long as that holds."""
        if self.degraded:
            self._memory.hold_off(tenant_id, plan, tokens)
            return
        refused = self._refused.get(tenant_id)
        if refused is None:
            return
        if refused.terms is self._terms.of(plan):
            refused.hold_off(tokens)
        del self._refused[tenant_id]

    def admit_now(self, tenant_id: TenantId, plan: Plan, tokens: int) -> Admission | None:
        """As in `Limits`: Redis is always waited for."""
        return UNLIMITED if self._terms.of(plan) is None else None

    async def admit(self, tenant_id: TenantId, plan: Plan, tokens: int) -> Admission:
        """As in `Limits`."""
        terms = self._terms.of(plan)
        if terms is None:
            return UNLIMITED
        terms.check_fits(tokens)
        member = f"{self._name}{next(self._numbers):x}:{tokens}"
        answer = await self._ask(self._admission(tenant_id, member, tokens, terms, terms.month))
        if answer is not None and answer[0] == b"unknown":
            month = terms.month if await self._learn_month(tenant_id) else None
            answer = await self._ask(self._admission(tenant_id, member, tokens, terms, month))
        if answer is None or answer[0] == b"unknown":
            return await self._memory.admit(tenant_id, plan, tokens)
        verdict, requests, spent, used, _ = answer
        if verdict != b"admitted":
            known_s = self._known_s[verdict]
            self._note_refused(tenant_id, Refused(terms, verdict, requests / 1e6, spent / 1e6, used, known_s))
            if verdict == b"month":
                raise terms.spent(used, tokens)
            raise terms.too_many(requests / 1e6, spent / 1e6, tokens)
        self._running[member] = tenant_id
        return Lease(self, tenant_id, member, terms, terms.headers(requests / 1e6, spent / 1e6))

    async def take_load(self, tenant_id: TenantId, per_minute: int) -> float:
        """As in `Limits`: an answer that gets lost may have counted a load."""
        wait_us = await self._ask(Call(scripts.LOAD, tenant_id, (per_minute, KEPT_S)))
        return await self._memory.take_load(tenant_id, per_minute) if wait_us is None else wait_us / 1e6

    def _note_refused(self, tenant_id: TenantId, refused: "Refused") -> None:
        if len(self._refused) >= MOST_REFUSED:
            self._refused.clear()
        self._refused[tenant_id] = refused

    def release(self, tenant_id: TenantId, member: str) -> None:
        """Written behind: the lease runs out now, and can still be settled."""
        if self._running.pop(member, None) is not None:
            self._write(Call(scripts.RENEW, tenant_id, (0, KEPT_S, member)))

    def settle(self, tenant_id: TenantId, member: str, terms: Terms, tokens: int) -> None:
        """Written behind; a lease is settled once, whatever is sent twice."""
        self._running.pop(member, None)
        self._write(Call(scripts.SETTLE, tenant_id, (member, tokens, _or_nothing(terms.tokens), 0)))

    def _admission(self, tenant_id: TenantId, member: str, tokens: int, terms: Terms, month: int | None) -> "Call":
        limits = (_or_nothing(terms.requests), _or_nothing(terms.tokens), _or_nothing(terms.running))
        times = (self._lease_s, self._settle_within_s, KEPT_S)
        return Call(scripts.ADMIT, tenant_id, (member, tokens, *limits, "" if month is None else month, *times))

    # what a tenant has used of the month

    async def _learn_month(self, tenant_id: TenantId) -> bool:
        """Redis has no count: put there what the database has. False where that does not answer in time."""
        task = self._learning.get(tenant_id)
        if task is None:
            if time.monotonic() < self._learn_at.get(tenant_id, 0.0):
                return False
            task = self._learning[tenant_id] = asyncio.create_task(self._seed(tenant_id))
        await asyncio.wait([task], timeout=self._timeout_s)
        known = task.done() and not task.cancelled() and task.result()
        if not known:
            self._learn_at[tenant_id] = time.monotonic() + LEARN_AGAIN_S
        return known

    async def _seed(self, tenant_id: TenantId) -> bool:
        try:
            used = await self._used_this_month(tenant_id, month_of(time.time())[0])
        except Exception as error:  # noqa: BLE001  whatever it is, requests go on and the question is asked again
            log.warning(
                "the month's tokens of %s are not known: the budget is not enforced until the database answers (%s)",
                tenant_id,
                type(error).__name__,
            )
            return False
        else:
            self._learn_at.pop(tenant_id, None)
            return await self._ask(Call(scripts.SEED, tenant_id, (used, KEPT_S))) is not None
        finally:
            del self._learning[tenant_id]

    def _note_alone(self, tenant_id: TenantId, tokens: int) -> None:
        """A request that memory admitted has ended: its tokens are the month's too."""
        before, since = self._alone.get(tenant_id, (0, time.monotonic() + self._ahead_s))
        self._alone[tenant_id] = (before + tokens, since)
        self._write_event.set()

    # asking

    async def _ask(self, call: "Call") -> Any:
        """The script's answer; None where Redis does not give one."""
        if self.degraded:
            return None
        self._asked.append(call)
        self._ask_event.set()
        try:
            return await call.answer
        except asyncio.CancelledError:
            if call.answer.done() and not call.answer.cancelled():  # the answer was there, and nobody will read it
                self._take_back([call])
            raise

    async def _ask_for_ever(self) -> None:
        while True:
            await self._ask_event.wait()
            self._ask_event.clear()
            while self._asked:
                calls = self._asked[:BATCH]
                del self._asked[:BATCH]
                try:
                    await self._fly(calls)
                except Exception as error:  # asking must never end: every request would wait for ever
                    log.exception("an answer of Redis could not be taken in")
                    self._let_go(calls)
                    self._degrade(error)

    async def _fly(self, calls: Sequence["Call"]) -> None:
        try:
            answers = await self._link.run(calls)
        except FAILURES as error:
            self._degrade(error)
            self._take_back(calls)
            self._let_go(calls)
            return
        for call, answer in zip(calls, answers, strict=True):
            if call.script is scripts.ADMIT:
                self._ahead_s = answer[4] / 1e6 - time.monotonic()
                if call.answer.done():  # who asked has gone
                    self._take_back([call])
            if not call.answer.done():
                call.answer.set_result(answer)

    def _take_back(self, calls: Iterable["Call"]) -> None:
        """Nobody knows whether these were admitted, or nobody wants them: if they were, nothing of it remains."""
        for call in calls:
            if call.script is scripts.ADMIT:
                self._write(Call(scripts.SETTLE, call.tenant_id, (call.arguments[0], 0, call.arguments[3], 1)))

    @staticmethod
    def _let_go(calls: Iterable["Call"]) -> None:
        for call in calls:
            if not call.answer.done():
                call.answer.set_result(None)

    # writing behind

    def _write(self, call: "Call") -> None:
        if len(self._written) >= QUEUE_LIMIT:
            if not self.dropped:
                log.error("too many settlements wait for Redis: the leases of further ones run out by themselves")
            self.dropped += 1
            return
        self._written.append(call)
        self._write_event.set()

    async def _write_behind(self) -> None:
        while True:
            await self._write_event.wait()
            await asyncio.sleep(BATCH_S)
            self._write_event.clear()
            if not self.degraded:
                await self._write_all()

    async def _write_all(self) -> None:
        try:
            await self._write_out()
        except FAILURES as error:
            self._degrade(error)

    async def _write_out(self) -> None:
        """What fails stays in the queue and is sent again: each of these counts once."""
        async with self._writing:
            while self._written or self._alone:
                for tenant_id, (tokens, since) in self._alone.items():
                    number = next(self._numbers)
                    self._written.append(Call(scripts.FORWARD, tenant_id, (self._name, number, tokens, since)))
                self._alone.clear()
                batch = list(itertools.islice(self._written, BATCH))
                await self._link.run(batch)
                for call in batch:
                    self._written.popleft()
                    refused = self._refused.get(call.tenant_id)
                    if refused is not None:
                        refused.until = 0.0  # a request of this gateway's has ended: there may be room again

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._lease_s / 3)
            if not self.degraded:
                try:
                    await self._renew_all()
                except FAILURES as error:
                    self._degrade(error)

    async def _renew_all(self) -> None:
        members: defaultdict[TenantId, list[str]] = defaultdict(list)
        for member, tenant_id in self._running.items():
            members[tenant_id].append(member)
        calls = [
            Call(scripts.RENEW, tenant_id, (self._lease_s, KEPT_S, *found[begin : begin + BATCH]))
            for tenant_id, found in members.items()
            for begin in range(0, len(found), BATCH)
        ]
        for begin in range(0, len(calls), BATCH):
            await self._link.run(calls[begin : begin + BATCH])

    # away and back

    def _degrade(self, error: Exception) -> None:
        if self.degraded:
            return
        self.degraded = True
        self.outages += 1
        log.warning("Redis does not answer (%s): limits are counted in this gateway alone", type(error).__name__)
        self._memory.forget_months()
        self._let_go(self._asked)
        self._asked.clear()
        self._returning = asyncio.create_task(self._return())

    async def _return(self) -> None:
        while self.degraded:
            await asyncio.sleep(self._probe_s)
            await self._link.close()
            self._link = Link(self._url, self._timeout_s)
            try:
                await self._link.open()
                await self._renew_all()
                await self._write_out()
            except FAILURES as error:
                log.debug("Redis is still away: %s", type(error).__name__)
            else:
                self.degraded = False
                log.warning("Redis answers again: limits are counted for all gateways together")


class Refused:
    """What of a tenant's limits was used when Redis refused it, and until when that is taken for known.

    Requests come back with time alone. Tokens and places come back as requests end too, anywhere.
    """

    __slots__ = ("at", "requests", "terms", "tokens", "until", "used", "verdict")

    def __init__(self, terms: Terms, verdict: bytes, requests: float, tokens: float, used: int, known_s: float) -> None:
        self.terms = terms
        self.verdict = verdict
        self.requests = requests
        self.tokens = tokens
        self.used = used
        self.at = time.monotonic()
        self.until = self.at + known_s

    def hold_off(self, asked: int) -> None:
        """As in `Limits`."""
        terms = self.terms
        now = time.monotonic()
        known = now < self.until
        if known and self.verdict == b"month" and self.used + (1 if asked else 0) > (terms.month or 0):
            raise terms.spent(self.used, asked)
        requests, spent = terms.left_of(self.requests, self.tokens, now - self.at)
        if known:
            terms.hold_off(requests, spent, asked)
        if requests + 1 > terms.requests + SLACK or (known and self.verdict == b"running"):
            raise terms.too_many(requests, spent, asked)


class Lease:
    """One running request in Redis."""

    __slots__ = ("_limits", "_member", "_tenant_id", "_terms", "headers")

    def __init__(self, limits: RedisLimits, tenant_id: TenantId, member: str, terms: Terms, headers: bytes) -> None:
        self.headers = headers
        self._limits = limits
        self._tenant_id = tenant_id
        self._member: str | None = member
        self._terms = terms

    def release(self) -> None:
        """As in `Admission`."""
        if self._member is not None:
            self._limits.release(self._tenant_id, self._member)

    def settle(self, tokens: int) -> None:
        """As in `Admission`."""
        member, self._member = self._member, None
        if member is not None:
            self._limits.settle(self._tenant_id, member, self._terms, tokens)


class Call:
    """One call of a script on a tenant's two keys."""

    __slots__ = ("answer", "arguments", "script", "tenant_id")

    def __init__(self, script: str, tenant_id: TenantId, arguments: tuple[str | float, ...]) -> None:
        self.script = script
        self.tenant_id = tenant_id
        self.arguments = arguments
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()


class Link:
    """A client that gives up at the deadline; once it has failed, it is to be closed and another opened."""

    def __init__(self, url: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._client = Redis.from_url(
            url,
            socket_connect_timeout=timeout_s,
            socket_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            max_connections=8,
        )
        self._digests: dict[str, str] = {}

    async def open(self) -> None:
        """Raises one of FAILURES."""
        async with asyncio.timeout(self._timeout_s):
            for script in scripts.ALL:
                self._digests[script] = await self._client.script_load(script)

    async def run(self, calls: Sequence[Call]) -> list[Any]:
        """The answers of all calls, sent in one write; raises one of FAILURES."""
        if not calls:
            return []
        async with asyncio.timeout(self._timeout_s):
            async with self._client.pipeline(transaction=False) as pipeline:
                for call in calls:
                    key = f"tailor:{{{call.tenant_id}}}"
                    digest = self._digests.get(call.script, "")
                    pipeline.execute_command("EVALSHA", digest, 2, key, f"{key}:leases", *call.arguments)
                answers: list[Any] = await pipeline.execute(raise_on_error=False)
        for answer in answers:
            if isinstance(answer, Exception):
                raise answer
        return answers

    async def close(self) -> None:
        await self._client.aclose()


def _or_nothing(limit: float) -> str | float:
    return limit if limit < float("inf") else ""
