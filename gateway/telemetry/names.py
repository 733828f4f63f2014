"""THE names: every metric, span and attribute that leaves the gateway. Plain strings: no SDK is imported for them.

Attribute names follow OpenTelemetry's semantic conventions (`http.*`, `error.*`: stable; `gen_ai.*`: in development);
what they have no name for is `tailor.*`. docs/telemetry.md has the tables; a test holds both equal.
"""

from dataclasses import dataclass
from typing import Final, Literal

Kind = Literal["counter", "gauge", "histogram", "summary"]


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric family as Prometheus sees it."""

    name: str
    kind: Kind
    labels: tuple[str, ...]
    help: str


# requests, seen by route
REQUESTS: Final = Metric(
    "tailor_requests_total", "counter", ("method", "route", "status"), "Requests by what they came to."
)
REQUEST_DURATION: Final = Metric(
    "tailor_request_duration_seconds", "histogram", ("method", "route"), "From a request's head to its answer's end."
)

# generation
TTFT: Final = Metric(
    "tailor_time_to_first_token_seconds",
    "histogram",
    ("route", "tier"),
    "From a streamed request's head to its answer's first token, by where the adapter was found.",
)
INTER_TOKEN: Final = Metric(
    "tailor_inter_token_seconds",
    "histogram",
    ("route",),
    "Mean time between tokens of one stream; one observation a stream.",
)
QUEUE: Final = Metric("tailor_queue_seconds", "histogram", (), "Wait for a replica's and an adapter slot's turn.")
LOAD_WAIT: Final = Metric(
    "tailor_load_wait_seconds", "histogram", ("tier",), "Wait of requests for their adapter to be loaded."
)
SLOT_REQUESTS: Final = Metric(
    "tailor_slot_requests_total",
    "counter",
    ("tier",),
    "Placed requests by where the adapter was: gpu (hit), host or cold (miss), base (needs none).",
)
TOKENS: Final = Metric(
    "tailor_tokens_total", "counter", ("route", "kind"), "Tokens: prompt, cached (a part of prompt), completion."
)
REPLICA_REQUESTS: Final = Metric(
    "tailor_replica_requests_total", "counter", ("replica", "outcome"), "Placed requests by replica and outcome."
)

# whose requests they are; capped, see docs/telemetry.md
TENANT_REQUESTS: Final = Metric(
    "tailor_tenant_requests_total", "counter", ("tenant", "outcome"), "Generation requests by tenant and outcome."
)
TENANT_TOKENS: Final = Metric(
    "tailor_tenant_tokens_total", "counter", ("tenant", "kind"), "Tokens by tenant: prompt, cached, completion."
)
TENANT_TTFT: Final = Metric(
    "tailor_tenant_time_to_first_token_seconds", "summary", ("tenant",), "Time to first token of a tenant's streams."
)
ADAPTER_REQUESTS: Final = Metric(
    "tailor_adapter_requests_total",
    "counter",
    ("tenant", "adapter", "outcome"),
    "Generation requests by adapter and outcome.",
)
ADAPTER_TOKENS: Final = Metric(
    "tailor_adapter_tokens_total",
    "counter",
    ("tenant", "adapter", "kind"),
    "Tokens by adapter: prompt, cached, completion.",
)
ADAPTER_TTFT: Final = Metric(
    "tailor_adapter_time_to_first_token_seconds",
    "summary",
    ("tenant", "adapter"),
    "Time to first token of an adapter's streams.",
)

# read from the parts when they are asked for
REPLICA_STATE: Final = Metric("tailor_replica_state", "gauge", ("replica", "state"), "1 for the state a replica is in.")
REPLICA_IN_FLIGHT: Final = Metric(
    "tailor_replica_in_flight_requests", "gauge", ("replica",), "Requests that a replica is answering."
)
REPLICA_WAITING: Final = Metric(
    "tailor_replica_waiting_requests", "gauge", ("replica",), "Requests that wait for their turn on a replica."
)
RESIDENT_ADAPTERS: Final = Metric(
    "tailor_replica_resident_adapters", "gauge", ("replica", "tier"), "Adapters that a replica holds, by tier."
)
DISK_BYTES: Final = Metric(
    "tailor_replica_disk_cache_bytes", "gauge", ("replica",), "Size of the adapters on a replica's disk."
)
PREFETCHES: Final = Metric(
    "tailor_adapter_prefetches_total",
    "counter",
    ("outcome",),
    "Adapters brought to a disk ahead of requests.",
)
QUARANTINED: Final = Metric("tailor_quarantined_adapters", "gauge", (), "Adapters that no engine may load just now.")
RECYCLES: Final = Metric(
    "tailor_replica_recycles_total", "counter", ("replica",), "Engines that died by themselves or computed NaN."
)
LOADS: Final = Metric(
    "tailor_adapter_loads_total", "counter", ("replica", "outcome"), "Loads of adapters into a replica: ok, failed."
)
LOAD_SECONDS: Final = Metric(
    "tailor_adapter_load_seconds_total", "counter", ("replica",), "Time spent on loading adapters into a replica."
)
EVICTIONS: Final = Metric(
    "tailor_adapter_evictions_total", "counter", ("replica",), "Adapters taken out of a replica for others."
)
CORRUPTED: Final = Metric(
    "tailor_corrupted_requests_total", "counter", ("replica",), "Requests whose logits were not finite, as vLLM counts."
)
PROOFS: Final = Metric(
    "tailor_proofs_total",
    "counter",
    ("verdict",),
    "Proofs of effect: proved, no_effect, failed, unsettled (tried again).",
)
LOAD_CHECKS: Final = Metric(
    "tailor_load_checks_total",
    "counter",
    ("replica", "verdict"),
    "Loads whose answers were compared with the version's fingerprint: same, mismatch, unchecked.",
)
RETRIES: Final = Metric("tailor_retries_total", "counter", (), "Requests sent to a second replica.")
IN_FLIGHT: Final = Metric("tailor_in_flight_requests", "gauge", (), "Generation requests that have not ended.")
OPEN_CONNECTIONS: Final = Metric("tailor_open_connections", "gauge", (), "Clients' connections.")
LIMITS_DEGRADED: Final = Metric(
    "tailor_limits_degraded", "gauge", (), "1 while Redis is away and each gateway limits for itself."
)
LEDGER_BACKLOG: Final = Metric(
    "tailor_ledger_backlog_rows",
    "gauge",
    (),
    "Rows of the usage ledger that the database does not have yet, or a few more.",
)
ROLLOUTS_RUNNING: Final = Metric("tailor_rollouts_running", "gauge", (), "Aliases on their way to another version.")
ROLLOUTS_ENDED: Final = Metric(
    "tailor_rollouts_ended_total", "counter", ("outcome",), "Rollouts that this gateway ended: completed, rolled_back."
)
JOBS_QUEUED: Final = Metric(
    "tailor_jobs_queued", "gauge", (), "Fine-tuning jobs that wait for a worker, of all tenants."
)
JOBS_RUNNING: Final = Metric("tailor_jobs_running", "gauge", (), "Fine-tuning jobs that a worker has.")
JOBS_OLDEST_AGE: Final = Metric(
    "tailor_jobs_oldest_queued_seconds", "gauge", (), "How long the job has waited that has waited longest; 0: none."
)
BLOB_FAULTS: Final = Metric(
    "tailor_blob_faults", "gauge", (), "Stored files that are damaged or gone, as they were last counted."
)
SCRUBBED: Final = Metric(
    "tailor_scrubbed_blobs_total",
    "counter",
    ("outcome",),
    "Stored files read again: ok, corrupt, missing, repaired, unreadable.",
)
SCRUBBED_BYTES: Final = Metric("tailor_scrubbed_bytes_total", "counter", (), "Bytes of stored files read again.")
CHANGE_FEED_AGE: Final = Metric(
    "tailor_change_feed_age_seconds", "gauge", (), "Time since the change feed was last read: how stale caches may be."
)

# the process
EVENT_LOOP_LAG: Final = Metric(
    "tailor_event_loop_lag_seconds", "histogram", (), "How late the event loop ran a timer, four times a second."
)
SCRAPE_FAULTS: Final = Metric(
    "tailor_scrape_faults_total", "counter", (), "Metrics that could not be read when they were asked for."
)
BUILD_INFO: Final = Metric("tailor_build_info", "gauge", ("version",), "1; says which version runs.")
PROCESS_CPU: Final = Metric("process_cpu_seconds_total", "counter", (), "User and system CPU time spent.")
PROCESS_MEMORY: Final = Metric("process_resident_memory_bytes", "gauge", (), "Resident memory.")
PROCESS_OPEN_FDS: Final = Metric("process_open_fds", "gauge", (), "Open file descriptors.")
PROCESS_MAX_FDS: Final = Metric("process_max_fds", "gauge", (), "Most file descriptors that may be open.")
PROCESS_START: Final = Metric("process_start_time_seconds", "gauge", (), "When the process began, in Unix seconds.")

METRICS: Final = tuple(value for value in tuple(globals().values()) if isinstance(value, Metric))

# spans
SCOPE: Final = "tailor.gateway"
QUEUE_SPAN: Final = "queue"
LOAD_SPAN: Final = "load adapter"
OPERATIONS: Final = {"/v1/completions": "text_completion"}
CHAT: Final = "chat"
"""The operation of every other generation route, in GenAI's words."""

# attributes of HTTP and of errors
HTTP_METHOD: Final = "http.request.method"
HTTP_ROUTE: Final = "http.route"
HTTP_STATUS: Final = "http.response.status_code"
ERROR_TYPE: Final = "error.type"

# attributes of generative AI
GEN_AI_OPERATION: Final = "gen_ai.operation.name"
GEN_AI_PROVIDER: Final = "gen_ai.provider.name"
GEN_AI_REQUEST_MODEL: Final = "gen_ai.request.model"
GEN_AI_REQUEST_STREAM: Final = "gen_ai.request.stream"
GEN_AI_INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
GEN_AI_OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
GEN_AI_CACHED_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
GEN_AI_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
PROVIDER: Final = "vllm"

# attributes of Tailor's own
REQUEST_ID: Final = "tailor.request.id"
TENANT_ID: Final = "tailor.tenant.id"
ADAPTER_ID: Final = "tailor.adapter.id"
ADAPTER_VERSION: Final = "tailor.adapter.version"
ADAPTER_TIER: Final = "tailor.adapter.tier"
REPLICA_ID: Final = "tailor.replica.id"
