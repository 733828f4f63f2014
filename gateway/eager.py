"""Coroutines that begin without a task: a request that finds all it needs in memory is on its way at once.

Python 3.12 has eager tasks; this is what 3.11 lacks of them. Until its first suspension such a coroutine has no current
task, which `asyncio.timeout` and much else ask for: whoever may come to that calls `into_task` first.
"""

import asyncio
from collections.abc import Callable, Coroutine, Generator
from types import coroutine
from typing import Any


def begin_now(work: Coroutine[Any, Any, None]) -> Coroutine[Any, Any, None] | None:
    """Run a coroutine up to its first suspension; the rest of it, to be made a task, or None where it has ended."""
    try:
        awaited = work.send(None)
    except StopIteration:
        return None
    return _rest(work, awaited)


async def into_task() -> None:
    """Suspend once where the caller does not run in a task of its own yet."""
    if asyncio.current_task() is None:
        await asyncio.sleep(0)


async def _rest(work: Coroutine[Any, Any, None], awaited: Any) -> None:
    await _go_on(work, awaited)


@coroutine
def _go_on(work: Coroutine[Any, Any, None], awaited: Any) -> Generator[Any, Any, None]:
    """What is awaited already goes to the task first; then all is passed on, cancellation too."""
    while True:
        try:
            sent = yield awaited
        except BaseException as error:  # noqa: BLE001  it is thrown where it belongs
            step: Callable[[Any], Any] = work.throw
            argument: Any = error
        else:
            step, argument = work.send, sent
        try:
            awaited = step(argument)
        except StopIteration:
            return
