"""Generation requests that have ended, counted: no lock, no lookup of labels, nothing allocated for one seen before."""

from collections.abc import Sequence
from typing import Final

from gateway.telemetry.observation import NOT_LOADED, Observation
from gateway.telemetry.series import OTHER, OUTCOMES, Capped, Histogram, Tokens, outcome_of

# seconds; fine where a good answer lies, coarse where only "too long" matters
Bounds = Sequence[float]
DURATION_BOUNDS: Final[Bounds] = (
    *(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0),
)
TTFT_BOUNDS: Final[Bounds] = (
    *(0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8, 1.0),
    *(1.5, 2.5, 4.0, 6.0, 10.0, 20.0, 40.0, 60.0),
)
INTER_TOKEN_BOUNDS: Final[Bounds] = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.5),
)
WAIT_BOUNDS: Final[Bounds] = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0),
)

REPLICA_LIMIT: Final = 256
MOST_WAITING: Final = 256


class Route:
    """What came to one route."""

    __slots__ = ("duration", "inter_token", "statuses", "tokens", "ttft")

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.duration = Histogram(DURATION_BOUNDS)
        self.inter_token = Histogram(INTER_TOKEN_BOUNDS)
        self.ttft: dict[str, Histogram] = {}
        self.tokens = Tokens()


class GenerationCounts:
    """Of one gateway process. `tenants` and `adapters` are how many ids keep a label of their own."""

    def __init__(self, *, tenants: int, adapters: int) -> None:
        self.routes: dict[str, Route] = {}
        self.tenants = Capped(tenants)
        self.adapters = Capped(adapters)
        self.replicas: dict[str, list[int]] = {}
        self.tiers: dict[str, int] = {}
        self.queue = Histogram(WAIT_BOUNDS)
        self.load_wait: dict[str, Histogram] = {}
        self._waiting: list[Observation] = []

    def later(self, seen: Observation) -> None:
        """As `count`, a quarter of a second later: many at once cost a third, as their code is in the caches then."""
        self._waiting.append(seen)
        if len(self._waiting) >= MOST_WAITING:
            self.catch_up()

    def catch_up(self) -> None:
        """Count what waits."""
        waiting, self._waiting = self._waiting, []
        for seen in waiting:
            self.count(seen)

    def count(self, seen: Observation) -> None:
        """Count a request; never raises for what a client can send."""
        route = self.routes.get(seen.route)
        if route is None:
            route = self.routes[seen.route] = Route()
        status = seen.status
        route.statuses[status] = route.statuses.get(status, 0) + 1
        route.duration.observe(seen.ended - seen.began)
        outcome = outcome_of(status)
        ttft_s = _first_token(route, seen) if seen.streamed and seen.first_at else None
        tokens = route.tokens
        tokens.prompt += seen.prompt_tokens
        tokens.cached += seen.cached_tokens
        tokens.completion += seen.completion_tokens
        if seen.tenant_id:
            self.tenants.of(seen.tenant_id, "", seen.ended).count(seen, outcome, ttft_s)
            if seen.adapter_id:
                self.adapters.of(seen.adapter_id, seen.tenant_id, seen.ended).count(seen, outcome, ttft_s)
        if seen.tier:
            self._placed(seen, outcome)
        elif seen.queue_s or seen.load_s:
            self._waited(seen, NOT_LOADED)

    def _placed(self, seen: Observation, outcome: int) -> None:
        tier = seen.tier
        self.tiers[tier] = self.tiers.get(tier, 0) + 1
        self._waited(seen, tier)
        outcomes = self.replicas.get(seen.replica)
        if outcomes is None:
            name = seen.replica if len(self.replicas) < REPLICA_LIMIT else OTHER
            outcomes = self.replicas.setdefault(name, [0] * len(OUTCOMES))
        outcomes[outcome] += 1

    def _waited(self, seen: Observation, tier: str) -> None:
        self.queue.observe(seen.queue_s)
        if seen.load_s:
            waits = self.load_wait.get(tier)
            if waits is None:
                waits = self.load_wait[tier] = Histogram(WAIT_BOUNDS)
            waits.observe(seen.load_s)


def _first_token(route: Route, seen: Observation) -> float:
    ttft_s = seen.first_at - seen.began
    histogram = route.ttft.get(seen.tier)
    if histogram is None:
        histogram = route.ttft[seen.tier] = Histogram(TTFT_BOUNDS)
    histogram.observe(ttft_s)
    if seen.completion_tokens > 1:
        route.inter_token.observe((seen.ended - seen.first_at) / (seen.completion_tokens - 1))
    return ttft_s
