"""Limits of a tenant's plan: reserved when a request is admitted, settled once when it has ended.

Rates are token buckets: a bucket holds one minute's limit and fills continuously, so that in any stretch of time no
more is admitted than one bucket plus what flowed in. Cold loads of adapters have one too. `memory.py` counts in this
process, `redis.py` for all gateways together; `open_limits` chooses. What one request may hold (`max_output_tokens`,
`max_prompt_bytes`) is not looked at here.
"""

from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from adapter_store.ids import TenantId
from gateway.plans import Plan

MonthReader = Callable[[TenantId, int], Awaitable[int]]
"""(tenant, first second of the month) → tokens that ended requests have used in it. `Ledger.tokens_since` is one."""


class Admission(Protocol):
    """An admitted request. `headers`: ready-made lines of `x-ratelimit-*`, empty where the plan has no such limit."""

    @property
    def headers(self) -> bytes: ...

    def release(self) -> None:
        """The request runs no longer, though what it used is not known yet: its reservation stands until `settle`."""

    def settle(self, tokens: int) -> None:
        """The request has ended and used `tokens`, prompt and answer together; further calls do nothing."""


class Limits(Protocol):
    """Counts what tenants use."""

    @property
    def degraded(self) -> bool:
        """Whether this gateway counts alone although it should count together with others."""

    def hold_off(self, tenant_id: TenantId, plan: Plan, tokens: int) -> None:
        """Refuse, before it is read, a request of a tenant that could not be given any; reserves nothing.

        `tokens`: about what it will ask for, for the time that is told; 0: it takes none. That nothing is raised
        promises nothing.

        Raises:
            RateLimited, TokenRateLimited, QuotaSpent: as `admit`.
        """

    def admit_now(self, tenant_id: TenantId, plan: Plan, tokens: int) -> Admission | None:
        """As `admit`, where nothing has to be waited for; None: call `admit`."""

    async def admit(self, tenant_id: TenantId, plan: Plan, tokens: int) -> Admission:
        """Reserve one request of at most `tokens` tokens, prompt and answer together: all limits of the plan or none.

        Raises:
            RateLimited, TokenRateLimited: too many just now; `retry_after_s` says when to come back.
            QuotaSpent: the month's budget does not hold this request.
            RequestExceedsLimit: not even an idle tenant could be given so many tokens.
        """

    async def take_load(self, tenant_id: TenantId, per_minute: int) -> float:
        """0 where a tenant may have one more adapter loaded that is cold, and that is counted; else seconds until then.

        `per_minute` are saved up for a minute; a load that fails counts too.
        """

    async def start(self) -> None: ...

    async def close(self) -> None: ...


class Unlimited:
    """The admission of a plan without limits: nothing to count, nothing to give back."""

    __slots__ = ()
    headers: Final = b""

    def release(self) -> None:
        """Nothing was reserved."""

    def settle(self, tokens: int) -> None:
        """Nothing was reserved."""


UNLIMITED: Final = Unlimited()


def open_limits(redis_url: str | None, *, used_this_month: MonthReader, timeout_s: float) -> Limits:
    """Limits in Redis where a URL is given, else in this process.

    `timeout_s`: how long a request waits for Redis, or for the database on a tenant's first request.
    """
    from gateway.limits.memory import MemoryLimits

    memory = MemoryLimits(used_this_month, timeout_s=timeout_s)
    if redis_url is None:
        return memory
    from gateway.limits.redis import RedisLimits  # 10 MiB that a gateway alone does not need

    return RedisLimits(redis_url, memory, used_this_month=used_this_month, timeout_s=timeout_s)
