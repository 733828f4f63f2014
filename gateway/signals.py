"""What a process that supervises others does on signals."""

import asyncio
import signal
from collections.abc import Awaitable, Callable


async def until_stopped(work: Callable[[asyncio.Event], Awaitable[None]], kill: Callable[[], None]) -> None:
    """Run `work` until it ends, or SIGINT or SIGTERM cancels it; a second one calls `kill`.

    `work` is given an event that SIGHUP sets.
    """
    loop = asyncio.get_running_loop()
    hangup = asyncio.Event()
    task = asyncio.ensure_future(work(hangup))
    stopped = False

    def stop() -> None:
        nonlocal stopped
        if stopped:
            kill()
        stopped = True
        task.cancel()

    loop.add_signal_handler(signal.SIGINT, stop)
    loop.add_signal_handler(signal.SIGTERM, stop)
    loop.add_signal_handler(signal.SIGHUP, hangup.set)
    try:
        await task
    except asyncio.CancelledError:
        if not stopped:
            raise
