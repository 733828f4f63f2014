"""How this machine's replicas are started: settings → command line and environment of vLLM with the agent."""

import argparse
import os
import shlex
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path

from adapter_store.agent.serve import launch_plan
from adapter_store.agent.settings import AgentSettings
from adapter_store.base_model import BaseModel
from gateway.home import ConfigurationError, Home
from gateway.settings import Settings


def replica_command(
    settings: Settings,
    home: Home,
    *,
    base_model: Path,
    base_name: str,
    listen: str,
    token: str,
    number: int = 0,
    count: int = 1,
) -> tuple[list[str], Mapping[str, str]]:
    """Command line and environment of one replica, of `count` on this machine, on `unix:/path` or `host:port`."""
    device = device_of(settings.device)
    base = BaseModel.read(base_model, name=base_name, dtype=settings.dtype)
    agent = AgentSettings(
        token=token,
        base_model=base_model,
        base_model_name=base.name,
        dtype=base.dtype,  # vLLM's own "auto" would serve a float32 model as bfloat16
        blobs_url=settings.blobs,
        cache=home.path / "cache" / (f"replica-{number}" if count > 1 else _cache_name(listen)),
        cache_limit_bytes=settings.cache_limit_bytes,
        tenant_slots=settings.adapter_slots,
        host_adapters=settings.host_adapters,
        max_lora_rank=served_rank(settings.max_lora_rank),
        needs_null_adapter=device == "cpu",
        idle_s=settings.adapter_idle_s,
    )
    command, environment = launch_plan(
        agent,
        listen=listen,
        max_model_len=settings.max_model_len,
        extra=tuple(shlex.split(settings.vllm_args)),
        device=device,
        tool_call_parser=settings.tool_call_parser,
    )
    if device == "cpu":
        environment["VLLM_CPU_KVCACHE_SPACE"] = str(settings.cpu_kv_cache_gib)
    # the gateway's own secrets are none of the engine's business
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("TAILOR_")}
    share = share_of_machine(number, count, device, shlex.split(settings.vllm_args), inherited) if count > 1 else {}
    return command, {**inherited, **environment, **share}


def _cache_name(listen: str) -> str:
    return f"replica-{sha256(listen.encode()).hexdigest()[:8]}"


def share_of_machine(
    number: int, count: int, device: str, vllm_args: Sequence[str], environment: Mapping[str, str]
) -> dict[str, str]:
    """What one of several replicas gets, as environment variables: GPUs of its own, or its share of the cores.

    Raises:
        ConfigurationError: CUDA_VISIBLE_DEVICES names too few GPUs.
    """
    width = _tensor_parallel(vllm_args)
    mine = slice(number * width, (number + 1) * width)
    if device == "cuda":
        visible = environment.get("CUDA_VISIBLE_DEVICES")
        gpus = visible.split(",") if visible else [str(gpu) for gpu in range(count * width)]
        if len(gpus) < count * width:
            raise ConfigurationError(
                f"CUDA_VISIBLE_DEVICES={visible} is too few for {count} replicas of {width} GPU(s)."
            )
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpus[mine])}
    if "VLLM_CPU_OMP_THREADS_BIND" in environment:
        return {}
    cpus = _cpus(count * width)
    if len(cpus) < count * width:
        return {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    each = len(cpus) // (count * width)
    shares = [",".join(cpus[start : start + each]) for start in range(0, len(cpus), each)]
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(shares[mine])}


def _tensor_parallel(vllm_args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    found: int = parser.parse_known_args(vllm_args)[0].tensor_parallel_size
    return found


def _cpus(wanted: int) -> list[str]:
    """One CPU of each physical core, whose two share its units; all CPUs where that is too few."""
    allowed = sorted(os.sched_getaffinity(0))
    by_core: dict[str, int] = {}
    for cpu in allowed:
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        by_core.setdefault(siblings.read_text() if siblings.exists() else str(cpu), cpu)
    found = list(by_core.values())
    return [str(cpu) for cpu in (found if len(found) >= wanted else allowed)]


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
