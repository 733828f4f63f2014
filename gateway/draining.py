"""uvicorn's server with an end that loses nothing: what has connected is answered, what runs gets its time.

uvicorn 0.54 closes its sockets at once, together with the connections that wait in their queues, and closes idle
connections in the moment in which their clients may write the next request.
"""

import asyncio
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, Final

import uvicorn

from gateway.listening import let_no_more_in

log = logging.getLogger("tailor.gateway")
LAST_ACCEPTS_S: Final = 0.1  # longer than a handshake that has begun
LAST_EVENTS_S: Final = 1.0
TICK_S: Final = 0.05


class DrainingServer(uvicorn.Server):
    """Serves until a signal, then drains.

    SIGTERM and SIGINT: `/ready` says so for `notice_s` while all goes on as before; then no new connection is taken,
    and requests get `drain_s`. SIGHUP, from the parent that has put another worker in this one's place: the same
    without notice. SIGINT twice ends at once.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        *,
        notice_s: float,
        drain_s: float,
        keeps_listening: bool,
        on_started: Callable[[], None],
        on_drain: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._notice_s = notice_s
        self._drain_s = drain_s
        self._keeps_listening = keeps_listening  # the sockets are the parent's, and the next worker's
        self._on_started = on_started
        self._on_drain = on_drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if sig == signal.SIGHUP:
            self._notice_s = 0.0
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._on_started()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._on_drain()
        await self._pause(self._notice_s)
        await self._stop_listening(sockets or [])
        for connection in list(self.server_state.connections):
            connection.shutdown()
        if not await self._until(self._is_idle, self._drain_s):
            await self._cut_off()
        if not self.force_exit:
            await self.lifespan.shutdown()

    async def _stop_listening(self, sockets: Sequence[socket.socket]) -> None:
        if not self._keeps_listening:
            for listener in sockets:
                let_no_more_in(listener)
        await self._pause(LAST_ACCEPTS_S)  # meanwhile the loop accepts what is in the queue
        for server in self.servers:
            server.close()
        for listener in sockets:
            listener.close()
        await asyncio.sleep(TICK_S)  # connections accepted last become known

    def _is_idle(self) -> bool:
        return not self.server_state.connections and not self.server_state.tasks

    async def _until(self, holds: Callable[[], bool], patience_s: float) -> bool:
        deadline = asyncio.get_running_loop().time() + patience_s
        while not holds():
            left_s = deadline - asyncio.get_running_loop().time()
            if self.force_exit or left_s <= 0:
                return False
            await asyncio.sleep(min(TICK_S, left_s))
        return True

    async def _pause(self, seconds: float) -> None:
        await self._until(lambda: False, seconds)

    async def _cut_off(self) -> None:
        """The time is over: streams end in an error event, whatever else runs is cancelled."""
        connections: list[Any] = list(self.server_state.connections)
        log.warning("%d connections cut off after %.0f s of draining", len(connections), self._drain_s)
        for connection in connections:
            connection.expire()
        await self._until(self._is_idle, LAST_EVENTS_S)
        for task in self.server_state.tasks:
            task.cancel()
        await self._until(lambda: not self.server_state.tasks, LAST_EVENTS_S)
