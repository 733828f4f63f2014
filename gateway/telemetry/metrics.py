"""The gateway's metrics: one call at the end of each request (`counting`), a page when Prometheus asks.

Everything that another part knows anyway (states, gauges, its own counters) is read when the page is written.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from importlib.metadata import version
from typing import Final

from gateway.telemetry import names, process
from gateway.telemetry.counting import Bounds, GenerationCounts, Route
from gateway.telemetry.exposition import head, labelled, sample
from gateway.telemetry.names import Metric
from gateway.telemetry.series import OUTCOMES, Capped, Histogram, Usage

log = logging.getLogger("tailor.metrics")

LAG_BOUNDS: Final[Bounds] = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
SLICE_S: Final = 0.001
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


class Metrics:
    """All metrics of one gateway process.

    Only the event loop's thread may call it. `tenants` and `adapters` are how many ids keep a label of their own.
    """

    def __init__(self, *, tenants: int, adapters: int) -> None:
        self.generation = GenerationCounts(tenants=tenants, adapters=adapters)
        self._control: dict[tuple[str, str], Route] = {}
        self._lag = Histogram(LAG_BOUNDS)
        self._reads: dict[Metric, Read] = {}
        self._faults = 0
        self._version = version("tailor")

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
            self.generation.catch_up()

    async def page(self) -> bytes:
        """Everything in Prometheus' text format, written in slices of a millisecond: requests go on between them.

        A family's numbers may be some milliseconds older than another's; one histogram's are always of one moment.
        """
        self.generation.catch_up()
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
        yield from _usage(self.generation.tenants, names.TENANT_REQUESTS, names.TENANT_TOKENS, names.TENANT_TTFT)
        yield from _usage(self.generation.adapters, names.ADAPTER_REQUESTS, names.ADAPTER_TOKENS, names.ADAPTER_TTFT)
        for metric, read in list(self._reads.items()):
            yield self._read(metric, read)
        yield head(names.EVENT_LOOP_LAG) + self._lag.lines(names.EVENT_LOOP_LAG.name, "")
        yield _single(names.SCRAPE_FAULTS, self._faults)
        yield head(names.BUILD_INFO) + sample(names.BUILD_INFO.name, labelled(("version",), (self._version,)), 1)
        for metric, value in process.figures().items():
            yield _single(metric, value)

    def _requests(self) -> Iterator[str]:
        generation = [(("POST", name), route) for name, route in self.generation.routes.items()]
        routes = generation + list(self._control.items())
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
        routes = list(self.generation.routes.items())
        yield head(names.TTFT)
        for name, route in routes:
            yield from _by_tier(names.TTFT, route.ttft, (name,))
        yield head(names.INTER_TOKEN)
        for name, route in routes:
            yield route.inter_token.lines(names.INTER_TOKEN.name, labelled(("route",), (name,)))
        yield head(names.QUEUE) + self.generation.queue.lines(names.QUEUE.name, "")
        yield head(names.LOAD_WAIT)
        yield from _by_tier(names.LOAD_WAIT, self.generation.load_wait, ())
        yield _family(names.SLOT_REQUESTS, [((tier,), count) for tier, count in self.generation.tiers.items()])
        tokens = [((name, kind), count) for name, route in routes for kind, count in route.tokens.by_kind()]
        yield _family(names.TOKENS, tokens)
        outcomes = [
            ((replica, outcome), count)
            for replica, counts in self.generation.replicas.items()
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
