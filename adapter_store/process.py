"""Process hygiene: no child process outlives the one that started it."""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends; idempotent, Linux only.

    Children of `tailor up` call it, and so do the engine's own processes. Without it a SIGKILL of the API
    process leaves the engine process, and its memory, behind (seen with vLLM 0.32).
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended between the two calls
        os.kill(os.getpid(), signal.SIGKILL)
