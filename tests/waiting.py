"""Waiting for what is meant, instead of sleeping for luck."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil

BEAT_S = 0.01


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


async def cancel(*tasks: asyncio.Task[None]) -> None:
    """Ends tasks that go on for ever. Raises what one of them has failed with."""
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended


@contextmanager
def stalls() -> Iterator[Callable[[], float]]:
    """Tells for how many seconds since the block began this whole process got no turn: they are no part of a measure.

    A thread sees them, so an event loop that something holds up, which is a defect, is none.
    """
    over, lock, total_s, beat = threading.Event(), threading.Lock(), 0.0, time.monotonic()

    def late_s(now: float) -> float:
        return now - beat - BEAT_S if now - beat > 2 * BEAT_S else 0.0

    def watch() -> None:
        nonlocal total_s, beat
        while not over.wait(BEAT_S):
            with lock:
                now = time.monotonic()
                total_s, beat = total_s + late_s(now), now

    def told_s() -> float:
        with lock:
            return total_s + late_s(time.monotonic())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield told_s
    finally:
        over.set()
        thread.join()


def is_gone(pid: int) -> bool:
    """Ended; whether who adopted it has taken note yet is not its matter."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
