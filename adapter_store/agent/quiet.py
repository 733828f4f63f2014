"""Keeps an idle CPU replica idle."""


def wait_quietly(spin_s: float = 0.002, recheck_ms: int = 50) -> None:
    """Let vLLM's processes sleep between messages instead of spinning for a second after each.

    Source: vllm/distributed/device_communicators/shm_broadcast.py, version 0.32. A GPU engine spends its own core on
    spinning; on CPU the core is the model's, and probes once a second kept it spinning for ever. Who sleeps is woken by
    a notice that may be lost, and vLLM looks again after five seconds only: rare where one sleeps after a second
    without a message, but here it is each step, and all streams of a replica stood still for five seconds every few
    minutes. Twenty looks a second cost an idle process 0.4 % of a core.
    """
    from vllm.distributed.device_communicators import shm_broadcast

    shm_broadcast.SpinCondition.__init__.__defaults__ = (spin_s,)
    shm_broadcast.SHM_READER_RECHECK_INTERVAL_MS = recheck_ms
