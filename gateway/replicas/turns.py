"""Waiting at a replica's gate: who must wait sleeps here, and is woken when its turn comes or the replica has gone."""

import asyncio
import math

from gateway.errors import TooBusy, TooManyWaiting
from gateway.fairness import FairGate, QueueFull, Turn

LEAST_WAKE_S = 0.001
RETRY_AFTER_S = 2


class ReplicaGone(Exception):
    """The replica takes no requests any more: ask another."""


class Turns:
    """The event loop's side of a `FairGate`."""

    def __init__(self, gate: FairGate) -> None:
        self.gate = gate
        self._futures: dict[Turn, asyncio.Future[None]] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._empty: asyncio.Event | None = None

    async def take(self, turn: Turn, timeout_s: float) -> None:
        """Let the request in, at once or when its turn comes; `leave` gives the turn back.

        Raises:
            TooManyWaiting, TooBusy: at once where the queue is full, TooBusy after `timeout_s` too.
            ReplicaGone: the replica has left rotation meanwhile.
        """
        if self.gate.enter(turn):
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._futures[turn] = future

        def go() -> None:
            if not future.done():
                future.set_result(None)

        try:
            self.gate.wait(turn, go)
        except QueueFull as full:
            del self._futures[turn]
            raise _refusal(full) from None
        self.arm()
        try:
            async with asyncio.timeout(timeout_s):
                await future
        except BaseException as error:
            if turn.started:
                self.gate.leave(turn, 0)
            else:
                self.gate.cancel(turn)
            self._note_change()
            if isinstance(error, TimeoutError):
                raise TooBusy(
                    f"The server is busy: the request has waited {math.ceil(timeout_s)} s; try again.",
                    retry_after_s=RETRY_AFTER_S,
                ) from None
            raise
        finally:
            del self._futures[turn]

    def leave(self, turn: Turn, tokens: int | None) -> None:
        """The request is over; it used `tokens`, None: nobody knows."""
        self.gate.leave(turn, tokens)
        if self._timer is not None or self.gate.waiting or self._empty is not None:
            self._note_change()

    def turn_away(self) -> None:
        """Wake all who wait: they must go elsewhere."""
        for future in list(self._futures.values()):
            if not future.done():
                future.set_exception(ReplicaGone())

    async def until_empty(self) -> None:
        """Until nothing is in flight or waits."""
        while self.gate.load:
            if self._empty is None:
                self._empty = asyncio.Event()
            await self._empty.wait()

    def arm(self) -> None:
        """See to it that adapters rotate in time."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self.gate.due()
        if due is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(max(due, loop.time() + LEAST_WAKE_S), self._rotate)

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _rotate(self) -> None:
        self._timer = None
        self.gate.rotate()
        self.arm()

    def _note_change(self) -> None:
        if self._empty is not None and not self.gate.load:
            self._empty.set()
            self._empty = None
        self.arm()


def _refusal(full: QueueFull) -> Exception:
    if full.of_tenant:
        return TooManyWaiting(
            "As many of your requests wait already as may: let some end first.", retry_after_s=RETRY_AFTER_S
        )
    return TooBusy("The server is busy: too many requests wait; try again.", retry_after_s=RETRY_AFTER_S)
