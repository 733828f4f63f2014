"""How this machine's replica is started: settings → command line and environment of vLLM with the agent."""

import os
import shlex
from collections.abc import Mapping
from pathlib import Path

from adapter_store.agent.serve import launch_plan
from adapter_store.agent.settings import AgentSettings
from adapter_store.base_model import BaseModel
from gateway.home import ConfigurationError, Home
from gateway.settings import Settings


def replica_command(
    settings: Settings, home: Home, *, base_model: Path, listen: str, token: str, name: str = "replica-0"
) -> tuple[list[str], Mapping[str, str]]:
    """Command line and environment of one replica that listens on `unix:/path` or `host:port`."""
    device = device_of(settings.device)
    base = BaseModel.read(base_model, name=settings.base_model_name, dtype=settings.dtype)
    agent = AgentSettings(
        token=token,
        base_model=base_model,
        base_model_name=base.name,
        dtype=base.dtype,  # vLLM's own "auto" would serve a float32 model as bfloat16
        blobs_url=settings.blobs,
        cache=home.path / "cache" / name,
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
    return command, {**os.environ, **environment}


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
