"""What the agent is told by whoever starts its process; it reads nothing else from its surroundings."""

import os
from pathlib import Path

import msgspec

ENVIRONMENT_VARIABLE = "TAILOR_AGENT"


class AgentSettings(msgspec.Struct, frozen=True, kw_only=True):
    """One replica's share of the configuration, handed over as JSON in one environment variable.

    `tenant_slots` counts adapters of tenants on the device at once (vLLM's `max_loras` less the null adapter's);
    `host_adapters` the adapters of tenants kept in host memory, the device's included (`max_cpu_loras` likewise).
    `idle_s`: an adapter without a request for so long is unloaded; 0: none is.
    """

    token: str
    base_model: Path
    base_model_name: str
    dtype: str
    blobs_url: str
    cache: Path
    cache_limit_bytes: int
    tenant_slots: int
    host_adapters: int
    max_lora_rank: int
    loads_waiting: int = 64
    idle_s: float = 0.0
    needs_null_adapter: bool = False

    @classmethod
    def from_environment(cls) -> "AgentSettings":
        """Read what `to_environment` wrote.

        Raises:
            RuntimeError: the variable is absent: this vLLM was not started by `tailor replica`.
        """
        text = os.environ.get(ENVIRONMENT_VARIABLE)
        if text is None:
            raise RuntimeError(f"{ENVIRONMENT_VARIABLE} is not set: start the replica with `tailor replica`")
        return msgspec.json.decode(text, type=cls, dec_hook=_decode_path)

    def to_environment(self) -> dict[str, str]:
        return {ENVIRONMENT_VARIABLE: msgspec.json.encode(self, enc_hook=str).decode()}


def _decode_path(kind: type, value: object) -> object:
    if kind is Path:
        return Path(str(value))
    raise TypeError(f"cannot decode {kind}")
