"""Process hygiene: no child outlives its parent, and no start-up memory outlives the start."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends; idempotent, Linux only.

    vLLM calls it in every one of its processes (`vllm.general_plugins`). Without it a SIGKILL of the API
    process leaves the engine process, and its memory, behind (seen with vLLM 0.32).
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended between the two calls
        os.kill(os.getpid(), signal.SIGKILL)


def give_back_free_memory() -> None:
    """Hand pages that were needed only to start up back to the system (glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
