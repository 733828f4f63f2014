"""Limits counted in this process: what one gateway alone needs, and what stands in for Redis while it is away."""

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import Final

from adapter_store.ids import TenantId
from gateway.fairness import LoadAllowance
from gateway.limits import UNLIMITED, Admission, MonthReader
from gateway.limits.terms import SLACK, KnownTerms, Terms, month_of
from gateway.plans import Plan

log = logging.getLogger("tailor.limits")
IDLE_S: Final = 3_600.0  # far above the minute in which a bucket is full again
LEARN_AGAIN_S: Final = 5.0
SLICE: Final = 500  # tenants looked at without letting others run


class MemoryLimits:
    """A few numbers per tenant. `admit` suspends only where a month's tokens must be asked for.

    That is a tenant's first request in this process. Where the database does not answer in `timeout_s`, the budget is
    not enforced until it does; the question is asked again in the background. `on_settled(tenant, tokens)` is told of
    every settled request of a tenant with a budget.
    """

    degraded: Final = False

    def __init__(
        self,
        used_this_month: MonthReader,
        *,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
        on_settled: Callable[[TenantId, int], None] | None = None,
    ) -> None:
        self.on_settled = on_settled
        self.clock = clock
        self.wall_clock = wall_clock
        self._used_this_month = used_this_month
        self._timeout_s = timeout_s
        self._terms = KnownTerms()
        self._tenants: dict[TenantId, Account] = {}
        self._learning: dict[TenantId, asyncio.Task[None]] = {}
        self._tidying: asyncio.Task[None] | None = None
        self._loads = LoadAllowance(clock)

    async def start(self) -> None:
        self._tidying = asyncio.create_task(self._tidy())

    async def close(self) -> None:
        tasks = [*self._learning.values(), *([self._tidying] if self._tidying else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def admit(self, tenant_id: TenantId, plan: Plan, tokens: int) -> Admission:
        """As in `Limits`."""
        admission = self.admit_now(tenant_id, plan, tokens)
        if admission is not None:
            return admission
        terms = self._terms.of(plan)
        assert terms is not None
        account = self._account(tenant_id)
        await self._turn_month(account)
        return self._reserve(account, terms, tokens)

    def admit_now(self, tenant_id: TenantId, plan: Plan, tokens: int) -> Admission | None:
        """As in `Limits`."""
        terms = self._terms.of(plan)
        if terms is None:
            return UNLIMITED
        account = self._account(tenant_id)
        if terms.month is not None and self.wall_clock() >= account.month_end:
            return None
        return self._reserve(account, terms, tokens)

    def hold_off(self, tenant_id: TenantId, plan: Plan, tokens: int) -> None:
        """As in `Limits`."""
        terms = self._terms.of(plan)
        if terms is None:
            return
        account = self._tenants.get(tenant_id)
        if account is None:
            return
        least = 1 if tokens else 0
        if (
            account.requests + 1 > terms.requests + SLACK
            or account.tokens + least > terms.tokens + SLACK
            or account.running >= terms.running
            or (terms.month is not None and account.used + least > terms.month)
        ):
            self._hold_off(account, terms, tokens, least)

    def _hold_off(self, account: "Account", terms: Terms, tokens: int, least: int) -> None:
        """What has flowed in since, or a new month, may still make room."""
        if terms.month is not None and account.used + least > terms.month and self.wall_clock() < account.month_end:
            raise terms.spent(account.used, tokens)
        requests, spent = terms.left_of(account.requests, account.tokens, self.clock() - account.at)
        terms.hold_off(requests, spent, tokens)
        if account.running >= terms.running:
            raise terms.too_many(requests, spent, tokens)

    async def take_load(self, tenant_id: TenantId, per_minute: int) -> float:
        """As in `Limits`."""
        return self._loads.take(tenant_id, per_minute)

    def _account(self, tenant_id: TenantId) -> "Account":
        account = self._tenants.get(tenant_id)
        if account is None:
            account = self._tenants[tenant_id] = Account(tenant_id, self.clock())
        return account

    def _reserve(self, account: "Account", terms: Terms, tokens: int) -> Admission:
        now = self.clock()
        requests, spent = terms.left_of(account.requests, account.tokens, now - account.at)
        if terms.month is not None and account.month_end and account.used + tokens > terms.month:
            raise terms.spent(account.used, tokens)
        if (
            requests + 1 > terms.requests + SLACK
            or spent + tokens > terms.tokens + SLACK
            or account.running >= terms.running
        ):
            terms.check_fits(tokens)
            raise terms.too_many(requests, spent, tokens)
        if terms.month is not None:
            account.used += tokens
            account.reserved += tokens
        requests += 1
        spent += tokens
        account.at = now
        account.requests = requests if terms.request_rate else 0.0
        account.tokens = spent if terms.token_rate else 0.0
        account.running += 1
        return Reservation(self, account, terms, tokens, terms.headers(requests, spent))

    async def _turn_month(self, account: "Account") -> None:
        """A new month has begun, or the running one is not known yet."""
        now = self.wall_clock()
        if account.month_end:
            account.used = account.reserved  # what ends in the new month counts there, as in the ledger
            account.month_end = month_of(now)[1]
            return
        task = self._learning.get(account.tenant_id)
        if task is None:
            if self.clock() < account.learn_at:
                return
            task = self._learning[account.tenant_id] = asyncio.create_task(self._learn(account))
        if account.learn_at == -math.inf:
            await asyncio.wait([task], timeout=self._timeout_s)
            account.learn_at = self.clock() + LEARN_AGAIN_S

    async def _learn(self, account: "Account") -> None:
        begin, end = month_of(self.wall_clock())
        try:
            used = await self._used_this_month(account.tenant_id, begin)
        except Exception as error:  # noqa: BLE001  whatever it is, requests go on and the question is asked again
            account.learn_at = self.clock() + LEARN_AGAIN_S
            log.warning(
                "the month's tokens of %s are not known: the budget is not enforced until the database answers (%s)",
                account.tenant_id,
                type(error).__name__,
            )
        else:
            account.used = used + account.reserved
            account.month_end = end
        finally:
            del self._learning[account.tenant_id]

    def forget_months(self) -> None:
        """Others have counted meanwhile: ask the database again."""
        for account in self._tenants.values():
            account.month_end = 0
            account.learn_at = -math.inf

    async def _tidy(self) -> None:
        """Drops tenants that have been idle for an hour, for ever."""
        while True:
            await asyncio.sleep(IDLE_S / 4)
            names = list(self._tenants)
            for begin in range(0, len(names), SLICE):
                self.drop_idle(names[begin : begin + SLICE])
                await asyncio.sleep(0)

    def drop_idle(self, tenant_ids: list[TenantId]) -> None:
        """Forget those that have nothing running and whose buckets have long been full."""
        before = self.clock() - IDLE_S
        for tenant_id in tenant_ids:
            account = self._tenants[tenant_id]
            if account.running == 0 and account.at < before and tenant_id not in self._learning:
                del self._tenants[tenant_id]

    def __len__(self) -> int:
        return len(self._tenants)


class Account:
    """What a tenant has spent: of its buckets at time `at`, and of the month that ends at `month_end` (0: not known).

    `used` has in it what is `reserved` for running requests.
    """

    __slots__ = ("at", "learn_at", "month_end", "requests", "reserved", "running", "tenant_id", "tokens", "used")

    def __init__(self, tenant_id: TenantId, at: float) -> None:
        self.tenant_id = tenant_id
        self.at = at
        self.requests = 0.0
        self.tokens = 0.0
        self.running = 0
        self.month_end = 0
        self.learn_at = -math.inf
        self.used = 0
        self.reserved = 0


class Reservation:
    """One running request's share of an account."""

    __slots__ = ("_account", "_is_running", "_limits", "_terms", "_tokens", "headers")

    def __init__(self, limits: MemoryLimits, account: Account, terms: Terms, tokens: int, headers: bytes) -> None:
        self.headers = headers
        self._limits = limits
        self._account: Account | None = account
        self._is_running = True
        self._terms = terms
        self._tokens = tokens

    def release(self) -> None:
        """As in `Admission`."""
        if self._account is not None and self._is_running:
            self._is_running = False
            self._account.running -= 1

    def settle(self, tokens: int) -> None:
        """As in `Admission`."""
        account = self._account
        if account is None:
            return
        self.release()
        self._account = None
        rate = self._terms.token_rate
        if rate and tokens != self._tokens:
            if tokens > self._tokens:  # a bucket that has filled up since owes from now on, not from before
                account.tokens = max(account.tokens, (self._limits.clock() - account.at) * rate)
            account.tokens += tokens - self._tokens
        if self._terms.month is not None or account.month_end:
            self._settle_month(account, tokens)

    def _settle_month(self, account: Account, used: int) -> None:
        reserved = self._tokens if self._terms.month is not None else 0
        if account.month_end and self._limits.wall_clock() >= account.month_end:
            account.used = account.reserved
            account.month_end = month_of(self._limits.wall_clock())[1]
        account.reserved -= reserved
        account.used += used - reserved
        if self._limits.on_settled is not None:
            self._limits.on_settled(account.tenant_id, used)
