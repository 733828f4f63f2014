"""THE configuration: name, type, unit, bound and default of every setting.

Each is an environment variable with the prefix `TAILOR_` (`TAILOR_PORT=8001`) or a line of `.env`. Everything below the
composition root takes plain values; nothing else reads the environment.
"""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from adapter_store.seeds import seed_of

Port = Annotated[int, Field(ge=1, le=65_535)]
Seconds = Annotated[float, Field(gt=0, le=3_600)]
_HOST = r"(?:[A-Za-z0-9_-]{1,63}\.)*[A-Za-z0-9_-]{1,63}\.?|\[[0-9a-fA-F:.]+\]"
_PORT = r"[1-9][0-9]{0,3}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5]"
ADDRESS = re.compile(rf"unix:/[^\x00\r\n]+|http://(?:{_HOST}):(?:{_PORT})/?")
LISTEN = re.compile(r"unix:/.+|[^/:]+:[0-9]{1,5}")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


class Settings(BaseSettings):
    """All faults of the environment are reported at once, at start."""

    model_config = SettingsConfigDict(env_prefix="TAILOR_", env_file=".env", extra="ignore", frozen=True)

    # where things live
    home: Path = Field(Path(".tailor"), description="folder of database, blobs, caches, logs and secrets")
    database_url: str | None = Field(None, description="SQLAlchemy URL; default: SQLite in the home folder")
    blobs_url: str | None = Field(None, description="obstore URL of the adapters' files; default: the home folder")
    blobs_copy_url: str | None = Field(
        None, description="obstore URL of a second copy of them, such as a backup, from which damaged ones are repaired"
    )
    scrub_bytes_per_s: int = Field(
        8 << 20, ge=0, description="how fast stored adapters are read again and compared with their digests; 0: never"
    )
    scrub_every_s: float = Field(
        604_800, ge=60, description="how long after a look at a stored adapter the next one is due; seconds"
    )

    # the public door
    host: str = Field("127.0.0.1", description="address to listen on; anything but loopback asks for allow_public")
    port: Port = Field(8000, description="TCP port to listen on")
    allow_public: bool = Field(False, description="listen on an address that other machines reach")
    workers: int = Field(
        1, ge=1, le=256, description="gateway processes that share the port; more than 1 asks for redis_url"
    )
    reuse_port: bool = Field(False, description="other gateways of this user may listen on the same port too")
    drain_notice_s: float = Field(
        0, ge=0, le=3_600, description="how long /ready says so, and all goes on, before a drain begins; seconds"
    )
    drain_s: Seconds = Field(30, description="time that running requests get after SIGTERM")
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="least level that is logged")

    # telemetry
    operator_host: str = Field("127.0.0.1", description="address of the operator port; others than loopback as above")
    operator_port: int = Field(
        9464,
        ge=0,
        le=65_535,
        description="port of GET /metrics, the first worker's; each next one has the next; 0: none",
    )
    metrics_tenants: int = Field(200, ge=0, le=100_000, description="tenants with a label of their own in the metrics")
    metrics_adapters: int = Field(
        500, ge=0, le=100_000, description="adapters with a label of their own in the metrics"
    )
    trace_trust_parent: bool = Field(
        False, description="callers may decide what is traced: set it behind a proxy that writes traceparent itself"
    )

    max_staleness_s: float = Field(
        60, ge=1, le=3_600, description="how long cached keys and aliases serve while the database is away"
    )

    # the base model
    base_model: str | None = Field(None, description="folder or Hugging Face id of the base model")
    base_model_name: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]{0,127}$",
        description="what tenants call it; default: folder name",
    )
    dtype: str = Field("auto", pattern="^(auto|float32|bfloat16|float16)$", description="serving dtype")

    # secrets
    secret_key: SecretStr | None = Field(
        None,
        min_length=16,
        description="salts the tenants' prefix caches; default: made once, kept in the home folder",
    )
    signing_key: SecretStr | None = Field(
        None,
        description="Ed25519 key that signs versions and erasures, 32 bytes in base64url; default: made once, kept in "
        "the home folder; gateways on one database need not share it",
    )
    replica_token: SecretStr | None = Field(
        None,
        min_length=16,
        description="what gateway and replicas know each other by; `tailor up` makes one and keeps it",
    )

    # requests
    max_body_bytes: int = Field(1 << 20, ge=1_024, le=64 << 20, description="largest JSON body")
    max_messages: int = Field(1_024, ge=1, le=65_536, description="most messages in one chat request")
    max_output_tokens: int = Field(4_096, ge=1, le=1 << 20, description="ceiling and default of max_tokens")
    max_choices: int = Field(4, ge=1, le=128, description="ceiling of n")
    max_schema_bytes: int = Field(16_384, ge=256, le=1 << 20, description="largest JSON schema an answer is held to")
    first_byte_timeout_s: Seconds = Field(300, description="longest wait for a replica's first byte")
    hear_out_s: float = Field(
        10,
        ge=0,
        le=600,
        description="how long an engine may go on with a whole answer whose client has left, for its count",
    )
    tool_call_parser: str | None = Field(
        None,
        pattern="^[a-z0-9_-]{1,64}$",
        description="vLLM's parser for the base model's tool calls; none: no tool_choice auto",
    )
    allowed_fields: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="further request fields that tenants may use, comma-separated: docs/api.md lists them"
    )

    # limits and the usage ledger
    redis_url: SecretStr | None = Field(
        None, description="where gateways share their limits: redis://, rediss:// or unix://; default: each its own"
    )
    limits_timeout_s: Seconds = Field(0.25, description="Redis slower than this: limits are counted in memory")
    usage_flush_s: Seconds = Field(1, description="time between two writings of usage into the database")
    usage_journal_bytes: int = Field(
        1 << 30, ge=1 << 20, description="most of the usage journal on disk while the database is away"
    )
    usage_fsync: bool = Field(False, description="each request's usage waits for the disk: for power cuts")

    # adapters
    max_lora_rank: int = Field(64, ge=1, le=512, description="highest rank served (vLLM reserves memory for it)")
    max_adapter_bytes: int = Field(2 << 30, ge=1_024, description="largest adapter upload")
    adapter_idle_s: float = Field(
        0, ge=0, le=604_800, description="unload an adapter without a request for so long; 0: none is; seconds"
    )
    upload_stall_s: Seconds = Field(30, description="an upload that brings nothing for so long is cut")
    uploads_at_once: int = Field(
        8, ge=1, le=1_000, description="uploads of one tenant, and parts of them, that a process takes in at a time"
    )
    upload_part_bytes: int = Field(16 << 20, ge=1_024, le=1 << 30, description="size of a resumable upload's parts")
    upload_expiry_s: int = Field(
        86_400, ge=60, le=30 * 86_400, description="an upload without a new part for so long is dropped; seconds"
    )
    import_root: Path | None = Field(
        None, description="folder below which operators may import adapters from; default: nowhere"
    )
    load_timeout_s: Seconds = Field(60, description="longest wait for an adapter to be loaded into a replica")

    # training files
    max_file_bytes: int = Field(512 << 20, ge=1_024, le=1 << 40, description="largest training file")
    file_expiry_s: int | None = Field(
        None, ge=3_600, description="when a file goes whose sender did not say; default: never; seconds"
    )

    file_check_timeout_s: Seconds = Field(900, description="longest check of a training file's lines")

    # proof of effect
    proof: str = Field(
        "flag",
        pattern="^(off|flag|require)$",
        description="versions are proved and flagged; require: an alias moves only to a proved one; off: neither",
    )
    proof_delay_s: float = Field(
        5,
        ge=0,
        le=60,
        description="from a publish to its version's proof; none where an alias or a rollout waits for it; seconds",
    )
    proof_timeout_s: Seconds = Field(
        60, description="longest time of one version's proof, the wait for its turn included"
    )

    # replicas
    replicas: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="addresses of the replicas, comma-separated: http://host:port or unix:/path"
    )
    probe_interval_s: Seconds = Field(1, description="time between two looks at a replica")
    probe_deadline_s: Seconds = Field(3, description="a replica without a token in this time is not ready")
    replica_concurrency: int | None = Field(
        None, ge=1, le=65_536, description="requests in flight on one replica; default: its engine's max_num_seqs"
    )
    spread_at: float = Field(
        16, gt=0, le=65_536, description="requests of one adapter in flight on a replica, above which it gets another"
    )

    # sharing a busy replica
    fairness: bool = Field(True, description="share by weight; off: first come, first served, for comparison")
    adapter_quantum_s: float = Field(
        1, ge=0, le=3_600, description="how long an adapter keeps its slot while others wait; 0: no rotation; seconds"
    )
    queue_limit: int = Field(1_024, ge=0, le=1 << 20, description="most requests that wait for one replica")
    tenant_queue_limit: int = Field(256, ge=0, le=1 << 20, description="most of those that are one tenant's")
    queue_timeout_s: Seconds = Field(30, description="longest wait of a request for its turn")

    # this machine's replica (`tailor up`, `tailor replica`)
    listen: str | None = Field(None, description="where `tailor replica` listens: unix:/path or host:port")
    local_replicas: int = Field(1, ge=1, le=64, description="replicas that `tailor up` starts")
    device: str = Field("auto", pattern="^(auto|cpu|cuda)$", description="which vLLM is expected")
    adapter_slots: int = Field(4, ge=1, le=512, description="adapters on the device at once (max_loras)")
    host_adapters: int = Field(32, ge=1, le=65_536, description="adapters in host memory (max_cpu_loras)")
    max_model_len: int | None = Field(None, ge=16, description="context length; default: the model's own")
    cpu_kv_cache_gib: int = Field(1, ge=1, description="KV cache of a CPU replica")
    cache_limit_bytes: int = Field(20 << 30, ge=1 << 20, description="a replica's disk cache of adapters")
    vllm_args: str = Field("", description="further vLLM arguments, as one would type them")

    # training (`tailor worker`, and those that `tailor up` starts)
    training_workers: int | None = Field(
        None, ge=0, le=64, description="training workers that `tailor up` starts; default: 1 where torch is installed"
    )
    training_device: str = Field("auto", pattern="^(auto|cpu|cuda)$", description="where a worker trains")
    training_threads: int | None = Field(
        None,
        ge=1,
        le=1_024,
        description="CPU threads of a worker; equal numbers give equal bytes; default: all, or 1 for a tiny base",
    )
    training_tokens: int = Field(
        4_096, ge=1, le=1 << 24, description="tokens of one batch, padding included, up to which jobs are put together"
    )
    training_jobs: int = Field(32, ge=1, le=1_024, description="most jobs that a worker trains at once")
    training_save_every_s: Seconds = Field(30, description="how much of a job's work a dead worker loses at most")
    training_lease_s: int = Field(
        60, ge=2, le=3_600, description="a worker that is silent for so long has lost its jobs; seconds"
    )
    training_nice: int = Field(10, ge=0, le=19, description="how far a worker stands back behind other processes")

    @field_validator("replicas", "allowed_fields", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @field_validator("replicas")
    @classmethod
    def _addresses(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for url in value:
            if not ADDRESS.fullmatch(url):
                raise ValueError(f"'{url}' is neither http://host:port nor unix:/path")
        return value

    @field_validator("allowed_fields")
    @classmethod
    def _may_be_allowed(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if value:
            from gateway.dialects.fields import OPT_IN

            unknown = sorted(set(value) - OPT_IN.keys())
            if unknown:
                raise ValueError(f"{', '.join(unknown)} cannot be allowed; these can: {', '.join(OPT_IN)}")
        return value

    @field_validator("listen")
    @classmethod
    def _listens_somewhere(cls, value: str | None) -> str | None:
        if value is not None and not LISTEN.fullmatch(value):
            raise ValueError(f"'{value}' is neither host:port nor unix:/path")
        return value

    @field_validator("redis_url")
    @classmethod
    def _redis(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not value.get_secret_value().startswith(("redis://", "rediss://", "unix://")):
            raise ValueError("begins with redis://, rediss:// or unix://")  # the value may hold a password
        return value

    @field_validator("signing_key")
    @classmethod
    def _signs(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            seed_of(value.get_secret_value())
        return value

    @field_validator("vllm_args")
    @classmethod
    def _arguments(cls, value: str) -> str:
        shlex.split(value)  # raises ValueError for an open quote
        return value

    @model_validator(mode="after")
    def _host_holds_slots(self) -> Self:
        if self.host_adapters < self.adapter_slots:
            raise ValueError(
                f"host_adapters ({self.host_adapters}) is below adapter_slots ({self.adapter_slots}): "
                "every adapter on the device is kept in host memory too"
            )
        return self

    @model_validator(mode="after")
    def _workers_share_limits(self) -> Self:
        if self.workers > 1 and self.redis_url is None:
            raise ValueError(
                f"workers is {self.workers}: set TAILOR_REDIS_URL, for limits that each worker keeps for itself "
                f"would be {self.workers} times as high"
            )
        return self

    @model_validator(mode="after")
    def _public_is_meant(self) -> Self:
        if self.host not in LOOPBACK and not self.allow_public:
            raise ValueError(
                f"host {self.host} is reachable from other machines: set TAILOR_ALLOW_PUBLIC=true if that is meant, "
                "and put TLS in front"
            )
        return self

    @model_validator(mode="after")
    def _operator_port_is_private(self) -> Self:
        if self.operator_port and self.operator_host not in LOOPBACK and not self.allow_public:
            raise ValueError(
                f"operator_host {self.operator_host} is reachable from other machines: set TAILOR_ALLOW_PUBLIC=true if "
                "that is meant, and let only your monitoring reach it"
            )
        return self

    @property
    def database(self) -> str:
        return self.database_url or f"sqlite+aiosqlite:///{self.home.absolute() / 'tailor.db'}"

    @property
    def blobs(self) -> str:
        return self.blobs_url or (self.home.absolute() / "blobs").as_uri()

    @property
    def url(self) -> str:
        """Where this machine reaches the gateway."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104  a key, no bind
        host = f"[{host}]" if ":" in host else host
        return f"http://{host}:{self.port}"


def explain(error: ValidationError) -> str:
    """Every fault of the settings, a line each, by the name under which it is set."""
    return "The settings cannot be used:\n" + faults_of(error, lambda name: f"TAILOR_{name.upper()}")


def faults_of(error: ValidationError, spell: Callable[[str], str]) -> str:
    """A line for each fault; `spell` writes a field's name as its user knows it."""
    lines = []
    for fault in error.errors():
        text = fault["msg"].removeprefix("Value error, ")
        name = "_".join(str(part) for part in fault["loc"])
        lines.append(f"  {spell(name)}: {text}" if name else f"  {text}")
    return "\n".join(lines)
