"""How this machine's replica is started: settings → command line and environment of vLLM with the agent."""

import os
import shlex
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from adapter_store.agent.serve import launch_plan
from adapter_store.agent.settings import AgentSettings
from adapter_store.base_model import BaseModel
from gateway.home import ConfigurationError, Home
from gateway.settings import Settings


def replica_command(
    settings: Settings, home: Home, *, base_model: Path, base_name: str, listen: str, token: str
) -> tuple[list[str], Mapping[str, str]]:
    """Command line and environment of one replica that listens on `unix:/path` or `host:port`."""
    device = device_of(settings.device)
    base = BaseModel.read(base_model, name=base_name, dtype=settings.dtype)
    agent = AgentSettings(
        token=token,
        base_model=base_model,
        base_model_name=base.name,
        dtype=base.dtype,  # vLLM's own "auto" would serve a float32 model as bfloat16
        blobs_url=settings.blobs,
        cache=home.path / "cache" / f"replica-{sha256(listen.encode()).hexdigest()[:8]}",
        cache_limit_bytes=settings.cache_limit_bytes,
        tenant_slots=settings.adapter_slots,
        host_adapters=settings.host_adapters,
        max_lora_rank=served_rank(settings.max_lora_rank),
        needs_null_adapter=device == "cpu",
    )
    command, environment = launch_plan(
        agent,
        listen=listen,
        max_model_len=settings.max_model_len,
        extra=tuple(shlex.split(settings.vllm_args)),
        device=device,
    )
    if device == "cpu":
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(settings.cpu_kv_cache_gib)
    # the gateway's own secrets are none of the engine's business
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TAILOR_")}
    return command, {**inherited, **environment}


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def served_rank(highest: int) -> int:
    """The smallest `--max-lora-rank` that vLLM 0.32 takes and that holds `highest`."""
    return next(rank for rank in VLLM_RANKS if rank >= highest)


def device_of(setting: str) -> str:
    """`cpu` or `cuda`: as set, or by which of the two vLLM packages is installed.

    Raises:
        ConfigurationError: neither is.
    """
    if setting != "auto":
        return setting
    from importlib.metadata import PackageNotFoundError, version

    for package, device in (("vllm-cpu", "cpu"), ("vllm", "cuda")):
        try:
            version(package)
        except PackageNotFoundError:
            continue
        return device
    raise ConfigurationError("vLLM is not installed here: pip install 'tailor[cpu]' or 'tailor[gpu]'.")
