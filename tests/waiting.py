"""Waiting for what is meant, instead of sleeping for luck."""

import asyncio
import time
from collections.abc import Callable

import psutil


async def until(holds: Callable[[], bool], deadline_s: float = 60) -> float:
    """Seconds until it holds.

    Raises:
        TimeoutError: it did not in time.
    """
    begin = time.monotonic()
    async with asyncio.timeout(deadline_s):
        while not holds():
            await asyncio.sleep(0.01)
    return time.monotonic() - begin


def is_gone(pid: int) -> bool:
    """Ended; whether who adopted it has taken note yet is not its matter."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
