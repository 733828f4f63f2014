"""Pure: a plan's limits as the counting needs them, and how they are told to clients."""

import math
from datetime import UTC, datetime
from typing import Final

from gateway.errors import QuotaSpent, RateLimited, RequestExceedsLimit, TokenRateLimited
from gateway.plans import Plan

MINUTE_S: Final = 60.0
SLACK: Final = 1e-6  # requests or tokens: far above what floats lose, so that the last one of a limit always fits
BUSY_RETRY_S: Final = 1.0  # nobody knows when a running request ends
KEPT: Final = 1_024
PAIR: Final = b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %%d\r\nx-ratelimit-reset-%b: %%b\r\n"


class Terms:
    """A plan's limits; where there is none, the limit is infinite and the rate 0. Rates are per second."""

    __slots__ = ("_lines", "month", "request_rate", "requests", "running", "token_rate", "tokens")

    def __init__(self, plan: Plan) -> None:
        self.requests = _limit(plan.requests_per_minute)
        self.tokens = _limit(plan.tokens_per_minute)
        self.running = _limit(plan.concurrent_requests)
        self.month = plan.tokens_per_month
        self.request_rate = (plan.requests_per_minute or 0) / MINUTE_S
        self.token_rate = (plan.tokens_per_minute or 0) / MINUTE_S
        told = ((b"requests", plan.requests_per_minute), (b"tokens", plan.tokens_per_minute))
        self._lines = b"".join(PAIR % (name, limit, name, name) for name, limit in told if limit is not None)

    def headers(self, requests: float, tokens: float) -> bytes:
        """Lines of `x-ratelimit-*`; `requests` and `tokens` are what is spent of each bucket."""
        if not self._lines:
            return b""
        values: tuple[object, ...] = ()
        if self.requests < math.inf:
            values = (_remaining(self.requests, requests), spelled(_time(requests, self.request_rate)))
        if self.tokens < math.inf:
            values += (_remaining(self.tokens, tokens), spelled(_time(tokens, self.token_rate)))
        return self._lines % values

    def left_of(self, requests: float, tokens: float, gone_s: float) -> tuple[float, float]:
        """What is still spent of each bucket when it has been filled for so long."""
        requests -= gone_s * self.request_rate
        tokens -= gone_s * self.token_rate
        return (requests if requests > 0 else 0.0), (tokens if tokens > 0 else 0.0)

    def check_fits(self, tokens: int) -> None:
        """Raises RequestExceedsLimit where one request of so many tokens could never be admitted."""
        if tokens > self.tokens:
            raise RequestExceedsLimit(
                f"This request may use up to {tokens} tokens, prompt and answer together, and your plan gives "
                f"{self.tokens:.0f} tokens a minute: it can never be admitted. Ask for fewer max_tokens or send less.",
                param="max_tokens",
                headers=_pairs(self.headers(0, 0)),
            )

    def hold_off(self, requests: float, tokens: float, asked: int) -> None:
        """Raises RateLimited where what is spent leaves no room for any request, nor for its first token."""
        if requests + 1 > self.requests + SLACK or tokens + (1 if asked else 0) > self.tokens + SLACK:
            raise self.too_many(requests, tokens, asked)

    def too_many(self, requests: float, tokens: float, asked: int) -> RateLimited:
        """The error of a request that would ask for `asked` tokens more than what is spent, and when to come back."""
        asked = min(asked, int(self.tokens)) if self.tokens < math.inf else asked
        waits = (
            (_time(tokens + asked - self.tokens, self.token_rate), TokenRateLimited, "tokens", self.tokens),
            (_time(requests + 1 - self.requests, self.request_rate), RateLimited, "requests", self.requests),
        )
        wait_s, kind, noun, limit = max(waits, key=lambda found: found[0])
        if wait_s > 0:
            message = f"Your plan's limit of {limit:.0f} {noun} a minute is reached: try again in {wait_s:.3g} s."
        else:
            kind, wait_s = RateLimited, BUSY_RETRY_S
            message = f"Your plan's limit of {self.running:.0f} requests at a time is reached: let one end first."
        headers = _pairs(self.headers(requests, tokens) + b"retry-after-ms: %d\r\n" % math.ceil(wait_s * 1_000))
        return kind(message, retry_after_s=max(1, math.ceil(wait_s)), headers=headers)

    def spent(self, used: float, asked: int) -> QuotaSpent:
        """The error of a request that the month's budget does not hold."""
        left = max(0, int((self.month or 0) - used))
        return QuotaSpent(
            f"Your plan's budget of {self.month} tokens a month does not hold this request: it may use up to {asked} "
            f"tokens and {left} are left. The next month (UTC) begins anew; your operator can give you another plan.",
            headers=((b"x-should-retry", b"false"),),  # OpenAI's clients would try a 429 again
        )


class KnownTerms:
    """Terms by plan: plans are few and shared, so a lookup is by identity."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Plan, Terms | None]] = {}  # the plan is held: its id is not given to another

    def of(self, plan: Plan) -> Terms | None:
        """None: the plan has no limits."""
        found = self._known.get(id(plan))
        if found is None:
            if len(self._known) >= KEPT:
                self._known.clear()
            found = self._known[id(plan)] = (plan, None if _is_unlimited(plan) else Terms(plan))
        return found[1]


def month_of(at: float) -> tuple[int, int]:
    """First second of the UTC month that holds `at`, and of the next one."""
    now = datetime.fromtimestamp(at, UTC)
    begin = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    end = begin.replace(year=begin.year + begin.month // 12, month=begin.month % 12 + 1)
    return int(begin.timestamp()), int(end.timestamp())


def spelled(seconds: float) -> bytes:
    """A duration as OpenAI spells it, rounded up: 120ms, 1s, 6m0s."""
    milliseconds = math.ceil(seconds * 1_000 - SLACK)
    if milliseconds <= 0:
        return b"0s"
    if milliseconds < 1_000:
        return b"%dms" % milliseconds
    minutes, rest = divmod(-(-milliseconds // 1_000), 60)
    return b"%dm%ds" % (minutes, rest) if minutes else b"%ds" % rest


def _is_unlimited(plan: Plan) -> bool:
    limits = (plan.requests_per_minute, plan.tokens_per_minute, plan.concurrent_requests, plan.tokens_per_month)
    return all(limit is None for limit in limits)


def _limit(value: int | None) -> float:
    return math.inf if value is None else value


def _remaining(limit: float, spent: float) -> int:
    return max(0, int(limit - spent + SLACK))


def _time(amount: float, rate: float) -> float:
    """Seconds in which `amount` flows into a bucket."""
    return amount / rate if rate else 0.0


def _pairs(lines: bytes) -> tuple[tuple[bytes, bytes], ...]:
    pairs = (line.split(b": ", 1) for line in lines.split(b"\r\n") if line)
    return tuple((name, value) for name, value in pairs)
