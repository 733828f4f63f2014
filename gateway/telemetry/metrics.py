"""The gateway's metrics: one call at the end of each request, a page when Prometheus asks.

`Metrics.request` is on the hot path: about 2.5 µs, no lock, no lookup of labels, nothing allocated for a label seen
before. Everything that another part knows anyway (states, gauges, its own counters) is read when the page is written.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from enum import Enum
from importlib.metadata import version
from typing import Final

from gateway.telemetry import names, process
from gateway.telemetry.exposition import head, labelled, sample
from gateway.telemetry.names import Metric
from gateway.telemetry.observation import Observation
from gateway.telemetry.series import OTHER, OUTCOMES, Capped, Histogram, Tokens, Usage, outcome_of

log = logging.getLogger("tailor.metrics")

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
LAG_BOUNDS: Final[Bounds] = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)

REPLICA_LIMIT: Final = 256
SLICE_S: Final = 0.001
MOST_WAITING: Final = 256
Labels = str | tuple[str, ...]
Reading = float | Mapping[Labels, float]
Read = Callable[[], Reading]
READABLE: Final = (
    names.REPLICA_STATE,
    names.REPLICA_IN_FLIGHT,
    names.REPLICA_WAITING,
    names.RESIDENT_ADAPTERS,
    names.DISK_BYTES,
    names.PREFETCHES,
    names.QUARANTINED,
    names.RECYCLES,
    names.LOADS,
    names.LOAD_SECONDS,
    names.EVICTIONS,
    names.CORRUPTED,
    names.PROOFS,
    names.LOAD_CHECKS,
    names.RETRIES,
    names.IN_FLIGHT,
    names.OPEN_CONNECTIONS,
    names.LIMITS_DEGRADED,
    names.LEDGER_BACKLOG,
    names.ROLLOUTS_RUNNING,
    names.ROLLOUTS_ENDED,
    names.JOBS_QUEUED,
    names.JOBS_RUNNING,
    names.JOBS_OLDEST_AGE,
    names.BLOB_FAULTS,
    names.SCRUBBED,
    names.SCRUBBED_BYTES,
    names.CHANGE_FEED_AGE,
)
"""What the other parts know and `Metrics.watch` attaches."""


class Route:
    """What came to one route."""

    __slots__ = ("duration", "inter_token", "statuses", "tokens", "ttft")

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.duration = Histogram(DURATION_BOUNDS)
        self.inter_token = Histogram(INTER_TOKEN_BOUNDS)
        self.ttft: dict[str, Histogram] = {}
        self.tokens = Tokens()


class Metrics:
    """All metrics of one gateway process.

    Only the event loop's thread may call it. `tenants` and `adapters` are how many ids keep a label of their own.
    """

    def __init__(self, *, tenants: int, adapters: int) -> None:
        self._waiting: list[Observation] = []
        self._generation: dict[str, Route] = {}
        self._control: dict[tuple[str, str], Route] = {}
        self._tenants = Capped(tenants)
        self._adapters = Capped(adapters)
        self._replicas: dict[str, list[int]] = {}
        self._tiers: dict[str, int] = {}
        self._queue = Histogram(WAIT_BOUNDS)
        self._load_wait: dict[str, Histogram] = {}
        self._lag = Histogram(LAG_BOUNDS)
        self._reads: dict[Metric, Read] = {}
        self._faults = 0
        self._version = version("tailor")

    def later(self, seen: Observation) -> None:
        """As `request`, a quarter of a second later: many at once cost a third, as their code is in the caches then."""
        self._waiting.append(seen)
        if len(self._waiting) >= MOST_WAITING:
            self._count_waiting()

    def _count_waiting(self) -> None:
        waiting, self._waiting = self._waiting, []
        for seen in waiting:
            self.request(seen)

    def request(self, seen: Observation) -> None:
        """Count a generation request that has ended; never raises for what a client can send."""
        route = self._generation.get(seen.route)
        if route is None:
            route = self._generation[seen.route] = Route()
        status = seen.status
        route.statuses[status] = route.statuses.get(status, 0) + 1
        route.duration.observe(seen.ended - seen.began)
        outcome = outcome_of(status)
        ttft_s = self._first_token(route, seen) if seen.streamed and seen.first_at else None
        tokens = route.tokens
        tokens.prompt += seen.prompt_tokens
        tokens.cached += seen.cached_tokens
        tokens.completion += seen.completion_tokens
        if seen.tenant_id:
            self._tenants.of(seen.tenant_id, "", seen.ended).count(seen, outcome, ttft_s)
            if seen.adapter_id:
                self._adapters.of(seen.adapter_id, seen.tenant_id, seen.ended).count(seen, outcome, ttft_s)
        if seen.tier:
            self._placed(seen, outcome)

    def control(self, route: str, method: str, status: int, duration_s: float) -> None:
        """Count any other request; `route` is the template, so that no path of a client's becomes a label."""
        key = (method, route)
        found = self._control.get(key)
        if found is None:
            found = self._control[key] = Route()
        found.statuses[status] = found.statuses.get(status, 0) + 1
        found.duration.observe(duration_s)

    def watch(self, metric: Metric, read: Read) -> None:
        """Have a metric read when the page is asked for.

        `read` gives a number, or numbers by label value (a tuple of them where the metric has several labels). It must
        not block. One that raises costs its own metric only, is logged, and counted.
        """
        assert metric in READABLE, metric.name
        self._reads[metric] = read

    def watch_states(self, states: Callable[[], Mapping[str, Enum]]) -> None:
        """Have the replicas' states read: 1 for the one that each is in, 0 for all others that there are."""
        self.watch(
            names.REPLICA_STATE,
            lambda: {
                (replica, str(each.value)): float(each is state)
                for replica, state in states().items()
                for each in type(state)
            },
        )

    def unwatched(self) -> set[str]:
        """Metrics that nothing was attached to, and that are missing from the page for it."""
        return {metric.name for metric in READABLE if metric not in self._reads}

    async def sample_lag(self, every_s: float = 0.25) -> None:
        """Observe for ever how late the event loop runs its timers; meant to run as one task."""
        while True:
            due = time.monotonic() + every_s
            await asyncio.sleep(every_s)
            self._lag.observe(max(0.0, time.monotonic() - due))
            self._count_waiting()

    async def page(self) -> bytes:
        """Everything in Prometheus' text format, written in slices of a millisecond: requests go on between them.

        A family's numbers may be some milliseconds older than another's; one histogram's are always of one moment.
        """
        self._count_waiting()
        pieces = []
        pause_at = time.perf_counter() + SLICE_S
        for piece in self.pieces():
            pieces.append(piece)
            if time.perf_counter() >= pause_at:
                await asyncio.sleep(0)
                pause_at = time.perf_counter() + SLICE_S
        return "".join(pieces).encode()

    def pieces(self) -> Iterator[str]:
        """The page's text, piece by piece; numbers and labels may change between two of them."""
        yield from self._requests()
        yield from self._generations()
        yield from _usage(self._tenants, names.TENANT_REQUESTS, names.TENANT_TOKENS, names.TENANT_TTFT)
        yield from _usage(self._adapters, names.ADAPTER_REQUESTS, names.ADAPTER_TOKENS, names.ADAPTER_TTFT)
        for metric, read in list(self._reads.items()):
            yield self._read(metric, read)
        yield head(names.EVENT_LOOP_LAG) + self._lag.lines(names.EVENT_LOOP_LAG.name, "")
        yield _single(names.SCRAPE_FAULTS, self._faults)
        yield head(names.BUILD_INFO) + sample(names.BUILD_INFO.name, labelled(("version",), (self._version,)), 1)
        for metric, value in process.figures().items():
            yield _single(metric, value)

    def _first_token(self, route: Route, seen: Observation) -> float:
        ttft_s = seen.first_at - seen.began
        histogram = route.ttft.get(seen.tier)
        if histogram is None:
            histogram = route.ttft[seen.tier] = Histogram(TTFT_BOUNDS)
        histogram.observe(ttft_s)
        if seen.completion_tokens > 1:
            route.inter_token.observe((seen.ended - seen.first_at) / (seen.completion_tokens - 1))
        return ttft_s

    def _placed(self, seen: Observation, outcome: int) -> None:
        tier = seen.tier
        self._tiers[tier] = self._tiers.get(tier, 0) + 1
        self._queue.observe(seen.queue_s)
        if seen.load_s:
            waits = self._load_wait.get(tier)
            if waits is None:
                waits = self._load_wait[tier] = Histogram(WAIT_BOUNDS)
            waits.observe(seen.load_s)
        outcomes = self._replicas.get(seen.replica)
        if outcomes is None:
            name = seen.replica if len(self._replicas) < REPLICA_LIMIT else OTHER
            outcomes = self._replicas.setdefault(name, [0] * len(OUTCOMES))
        outcomes[outcome] += 1

    def _requests(self) -> Iterator[str]:
        routes = [(("POST", name), route) for name, route in self._generation.items()] + list(self._control.items())
        yield head(names.REQUESTS)
        for (method, name), route in routes:
            for status, count in list(route.statuses.items()):
                labels = labelled(names.REQUESTS.labels, (method, name, str(status)))
                yield sample(names.REQUESTS.name, labels, count)
        duration = names.REQUEST_DURATION
        yield head(duration)
        for key, route in routes:
            yield route.duration.lines(duration.name, labelled(duration.labels, key))

    def _generations(self) -> Iterator[str]:
        routes = list(self._generation.items())
        yield head(names.TTFT)
        for name, route in routes:
            yield from _by_tier(names.TTFT, route.ttft, (name,))
        yield head(names.INTER_TOKEN)
        for name, route in routes:
            yield route.inter_token.lines(names.INTER_TOKEN.name, labelled(("route",), (name,)))
        yield head(names.QUEUE) + self._queue.lines(names.QUEUE.name, "")
        yield head(names.LOAD_WAIT)
        yield from _by_tier(names.LOAD_WAIT, self._load_wait, ())
        yield _family(names.SLOT_REQUESTS, [((tier,), count) for tier, count in self._tiers.items()])
        tokens = [((name, kind), count) for name, route in routes for kind, count in route.tokens.by_kind()]
        yield _family(names.TOKENS, tokens)
        outcomes = [
            ((replica, outcome), count)
            for replica, counts in self._replicas.items()
            for outcome, count in zip(OUTCOMES, counts, strict=True)
        ]
        yield _family(names.REPLICA_REQUESTS, outcomes)

    def _read(self, metric: Metric, read: Read) -> str:
        try:
            reading = read()
            if not isinstance(reading, Mapping):
                return _single(metric, reading)
            rows = [(key if isinstance(key, tuple) else (key,), float(value)) for key, value in reading.items()]
            return _family(metric, rows)
        except Exception:  # an edge: one part that cannot be read must not hide all the others
            self._faults += 1
            log.exception("metric %s cannot be read", metric.name)
            return ""


def _by_tier(metric: Metric, histograms: dict[str, Histogram], before: tuple[str, ...]) -> Iterator[str]:
    for tier, histogram in list(histograms.items()):
        yield histogram.lines(metric.name, labelled(metric.labels, (*before, tier)))


def _usage(usages: Capped, requests: Metric, tokens: Metric, ttft: Metric) -> Iterator[str]:
    """Three families of the same ids; what an id never had is left out."""
    labels = [(_whose(requests, key, usage), usage) for key, usage in usages.items()]
    yield head(requests)
    for whose, usage in labels:
        for outcome, count in zip(OUTCOMES, usage.outcomes, strict=True):
            if count:
                yield f'{requests.name}{{{whose},outcome="{outcome}"}} {count}\n'
    yield head(tokens)
    for whose, usage in labels:
        for kind, count in usage.by_kind():
            if count:
                yield f'{tokens.name}{{{whose},kind="{kind}"}} {count}\n'
    yield head(ttft)
    for whose, usage in labels:
        if usage.first_tokens:
            yield sample(f"{ttft.name}_sum", whose, usage.first_tokens_s)
            yield sample(f"{ttft.name}_count", whose, usage.first_tokens)


def _whose(metric: Metric, key: str, usage: Usage) -> str:
    names_of_it = metric.labels[:-1]
    return labelled(names_of_it, (key,) if len(names_of_it) == 1 else (usage.owner, key))


def _family(metric: Metric, samples: Iterable[tuple[tuple[str, ...], float]]) -> str:
    lines = [sample(metric.name, labelled(metric.labels, values), value) for values, value in samples]
    return head(metric) + "".join(lines)


def _single(metric: Metric, value: float) -> str:
    return head(metric) + sample(metric.name, "", float(value))
