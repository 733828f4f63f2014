"""What the metrics page reads from the gateway's parts when it is asked for."""

import time
from collections import Counter
from collections.abc import Callable, Mapping

from adapter_store.scrub import Outcome
from gateway.api.generation import Patience
from gateway.dependencies import Parts
from gateway.proofs import LoadVerdict
from gateway.replicas.replica import Replica
from gateway.telemetry import names
from gateway.telemetry.metrics import Labels


def watch_parts(parts: Parts, patience: Patience) -> None:
    """Attach every part that knows a number of its own."""
    metrics, pool = parts.metrics, parts.pool

    def by_replica(read: Callable[[Replica], float]) -> Callable[[], Mapping[Labels, float]]:
        return lambda: {member.replica.id: read(member.replica) for member in pool.members()}

    metrics.watch_states(pool.states)
    metrics.watch(names.REPLICA_IN_FLIGHT, by_replica(lambda replica: replica.gate.in_flight))
    metrics.watch(names.REPLICA_WAITING, by_replica(lambda replica: replica.gate.waiting))
    metrics.watch(names.RESIDENT_ADAPTERS, lambda: _residents(parts))
    metrics.watch(names.DISK_BYTES, by_replica(lambda replica: replica.report.disk.bytes if replica.report else 0))
    metrics.watch(names.PREFETCHES, lambda: _prefetches(parts))
    metrics.watch(names.QUARANTINED, lambda: parts.quarantine.count)
    metrics.watch(names.RECYCLES, by_replica(lambda replica: replica.recycles))
    metrics.watch(names.LOADS, lambda: _loads(parts))
    metrics.watch(names.LOAD_SECONDS, by_replica(lambda replica: replica.residency.load_seconds))
    metrics.watch(names.EVICTIONS, by_replica(lambda replica: replica.residency.evictions))
    metrics.watch(names.CORRUPTED, by_replica(lambda replica: replica.corrupted_requests))
    metrics.watch(names.PROOFS, lambda: {verdict: float(count) for verdict, count in parts.proofs.verdicts.items()})
    metrics.watch(names.LOAD_CHECKS, lambda: _load_checks(parts))
    metrics.watch(names.RETRIES, lambda: pool.retry_count)
    metrics.watch(names.IN_FLIGHT, lambda: len(patience.running))
    metrics.watch(names.OPEN_CONNECTIONS, lambda: len(parts.connections))
    metrics.watch(names.LIMITS_DEGRADED, lambda: float(parts.limits.degraded))
    metrics.watch(names.LEDGER_BACKLOG, lambda: parts.ledger.backlog)
    metrics.watch(names.ROLLOUTS_RUNNING, lambda: parts.rollout_watch.running)
    metrics.watch(names.ROLLOUTS_ENDED, lambda: _rollouts(parts))
    metrics.watch(names.JOBS_QUEUED, lambda: parts.job_figures.queued)
    metrics.watch(names.JOBS_RUNNING, lambda: parts.job_figures.running)
    metrics.watch(names.JOBS_OLDEST_AGE, lambda: parts.job_figures.oldest_age_s)
    metrics.watch(names.BLOB_FAULTS, lambda: parts.scrubber.fault_count)
    metrics.watch(names.SCRUBBED, lambda: {(outcome.value,): parts.scrubber.counts[outcome] for outcome in Outcome})
    metrics.watch(names.SCRUBBED_BYTES, lambda: parts.scrubber.read_bytes)
    metrics.watch(names.CHANGE_FEED_AGE, lambda: max(0.0, time.monotonic() - parts.freshness.fresh_at))


def _residents(parts: Parts) -> Mapping[Labels, float]:
    found: Counter[Labels] = Counter()
    for member in parts.pool.members():
        for resident in member.replica.residency.residents():
            found[member.replica.id, resident.tier] += 1
        if member.replica.report is not None:
            found[member.replica.id, "disk"] = member.replica.report.disk.adapters
    return {labels: float(count) for labels, count in found.items()}


def _rollouts(parts: Parts) -> Mapping[Labels, float]:
    ended = parts.rollout_watch.ended
    return {status: float(ended[status]) for status in ("completed", "rolled_back")}


def _prefetches(parts: Parts) -> Mapping[Labels, float]:
    counts = parts.pool.prefetch_counts
    return {"ok": counts["ok"], "failed": counts["failed"]}


def _load_checks(parts: Parts) -> Mapping[Labels, float]:
    """Zeros too: an alert sees a counter rise, not appear."""
    return {
        (member.replica.id, verdict.value): float(parts.proofs.checks[member.replica.id, verdict.value])
        for member in parts.pool.members()
        for verdict in LoadVerdict
    }


def _loads(parts: Parts) -> Mapping[Labels, float]:
    counts: dict[Labels, float] = {}
    for member in parts.pool.members():
        counts[member.replica.id, "ok"] = member.replica.residency.load_count
        counts[member.replica.id, "failed"] = member.replica.residency.failed_loads
    return counts
