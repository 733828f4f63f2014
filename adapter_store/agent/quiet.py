"""Keeps an idle CPU replica idle."""


def wait_quietly(spin_s: float = 0.002) -> None:
    """Let vLLM's processes sleep between messages instead of spinning for a second after each.

    Source: SpinCondition in vllm/distributed/device_communicators/shm_broadcast.py, version 0.32. A GPU engine spends
    its own core on that; on CPU the core is the model's, and probes once a second kept it spinning for ever.
    """
    from vllm.distributed.device_communicators.shm_broadcast import SpinCondition

    SpinCondition.__init__.__defaults__ = (spin_s,)
