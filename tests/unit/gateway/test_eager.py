"""A coroutine that begins without a task, and goes on as one."""

import asyncio

import pytest

from gateway.eager import begin_now, into_task


async def test_what_waits_for_nothing_is_done_at_once() -> None:
    """No task is made of it."""
    done = []

    async def work() -> None:
        done.append(True)

    assert begin_now(work()) is None
    assert done == [True]


async def test_what_is_awaited_goes_to_the_task() -> None:
    """A future's result and a future's error come where they were awaited."""
    loop = asyncio.get_running_loop()
    first: asyncio.Future[int] = loop.create_future()
    second: asyncio.Future[int] = loop.create_future()
    seen: list[object] = []

    async def work() -> None:
        seen.append(await first)
        try:
            await second
        except ValueError as error:
            seen.append(str(error))
        await asyncio.sleep(0)
        seen.append("end")

    rest = begin_now(work())
    assert rest is not None
    task = asyncio.create_task(rest)
    first.set_result(1)
    await asyncio.sleep(0.01)
    second.set_exception(ValueError("no"))
    await task
    assert seen == [1, "no", "end"]


async def test_a_cancellation_reaches_the_coroutine() -> None:
    """Also one that comes before the task has run at all."""
    for turns in (0, 3):
        cancelled: list[bool] = []

        async def work(cancelled: list[bool] = cancelled) -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append(True)
                raise

        rest = begin_now(work())
        assert rest is not None
        task = asyncio.create_task(rest)
        for _ in range(turns + 1):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cancelled == [True]


async def test_timeouts_work_once_in_a_task() -> None:
    """`asyncio.timeout` asks for a current task; without `into_task` it would raise."""
    late = []

    async def work() -> None:
        await into_task()
        try:
            async with asyncio.timeout(0.01):
                await asyncio.Event().wait()
        except TimeoutError:
            late.append(True)

    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    begun: asyncio.Future[asyncio.Task[None]] = loop.create_future()

    def as_a_protocol_does() -> None:
        assert asyncio.current_task() is not task
        rest = begin_now(work())
        assert rest is not None
        begun.set_result(loop.create_task(rest))

    loop.call_soon(as_a_protocol_does)
    await (await begun)
    assert late == [True]
