"""Requests that come together go through each step together, and what they write goes out together.

A request's path touches more code and data than a core's first caches hold, and a system call evicts them. Taken step
by step, all requests of one turn of the event loop find each step's code in the caches (docs/benchmarks.md has what
that saves). Nobody waits for others to come: a batch is what one turn has brought.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Generic, Protocol, TypeVar

log = logging.getLogger("tailor.batches")
Wait = Coroutine[Any, Any, None]
"""What a step waits for before the next one; whoever waits becomes a task."""


class Parked:
    """Of a step: somebody's call goes on with the request (`Batches.add`), from its `position`."""

    __slots__ = ()


PARKED: Final = Parked()


class Journey(Protocol):
    """Somebody who goes through the steps; `position` is that of the next one, `due`: it waits for the next turn."""

    position: int
    due: bool
    ended: bool

    def wait_for(self, wait: Wait) -> None:
        """A step has something to wait for: do so as a task, then `Batches.go_on`, from `position`."""

    def fail(self, error: Exception) -> None:
        """A step has failed: the journey is over."""


JourneyT = TypeVar("JourneyT", bound=Journey)
Step = Callable[[JourneyT], "Wait | Parked | None"]


class Batches(Generic[JourneyT]):
    """Of one event loop. `steps` raise what ends a journey; a step that returns None is followed by the next."""

    def __init__(self, steps: Sequence[Step[JourneyT]]) -> None:
        self._steps = steps
        self._due: list[JourneyT] = []
        self._writes: list[tuple[asyncio.WriteTransport, bytes]] = []
        self._closing: list[Callable[[], None]] = []
        self._is_due = False
        self._loop: asyncio.AbstractEventLoop | None = None  # asking for the running one is a system call

    def add(self, journey: JourneyT) -> None:
        """Take it on from its `position` in the loop's next turn, together with what else comes in this one."""
        if not journey.due:
            journey.due = True
            self._due.append(journey)
            if not self._is_due:
                self._arm()

    def write(self, transport: asyncio.WriteTransport, data: bytes) -> None:
        """Write when the steps of this turn are done; what goes to one transport stays in order."""
        self._writes.append((transport, data))
        if not self._is_due:
            self._arm()

    def after(self, then: Callable[[], None]) -> None:
        """Call when what has been written so far is out."""
        self._closing.append(then)
        if not self._is_due:
            self._arm()

    def go_on(self, journeys: Sequence[JourneyT], position: int) -> None:
        """Through the steps from `position` on, each step for all of them before the next."""
        for number in range(position, len(self._steps)):
            step = self._steps[number]
            going = []
            for journey in journeys:
                journey.position = number + 1
                try:
                    wait = step(journey)
                except Exception as error:  # noqa: BLE001  the edge: the journey tells its client, whatever it is
                    self._fail(journey, error)
                    continue
                if wait is None:
                    going.append(journey)
                elif not isinstance(wait, Parked):
                    journey.wait_for(wait)
            if not going:
                return
            journeys = going

    @staticmethod
    def _fail(journey: JourneyT, error: Exception) -> None:
        try:
            journey.fail(error)
        except Exception:  # one that cannot even fail must not take the others along
            log.exception("a request could not be ended after %r", error)

    def _arm(self) -> None:
        self._is_due = True
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._loop.call_soon(self._run)

    def _run(self) -> None:
        try:
            self._take_due()
            self._flush()
        finally:
            self._is_due = False
            if self._due or self._writes or self._closing:
                self._arm()

    def _take_due(self) -> None:
        due, self._due = self._due, []
        if due:
            groups: dict[int, list[JourneyT]] = {}
            for journey in due:
                journey.due = False
                if not journey.ended:
                    groups.setdefault(journey.position, []).append(journey)
            for position in sorted(groups, reverse=True):  # what has been answered leaves before more is begun
                self.go_on(groups[position], position)
                self._flush()

    def _flush(self) -> None:
        writes, self._writes = self._writes, []
        for transport, data in writes:
            if not transport.is_closing():  # who has gone in the same turn is told of already
                try:
                    transport.write(data)
                except Exception:  # the edge: one that cannot be written to is no other's fault
                    log.exception("a transport took no bytes")
                    transport.abort()
        if self._closing:
            closing, self._closing = self._closing, []
            for then in closing:
                try:
                    then()
                except Exception:  # the same
                    log.exception("an answer could not be ended")
