"""How much of bodies that have not come whole yet one tenant may have in a gateway's memory.

A body is read once its sender is known and before a plan's limits count the request, so that who sends many of them
slowly would hold a MiB with each, for minutes.
"""

import asyncio
from collections import deque
from typing import Final

from adapter_store.ids import TenantId
from gateway.errors import RateLimited

ROOM_BYTES: Final = 32 << 20
MOST_WAITING: Final = 256
"""Each holds what came with its head: 110 KiB of a large body."""
PATIENCE_S: Final = 10.0


class _Room:
    __slots__ = ("held", "line")

    def __init__(self) -> None:
        self.held = 0
        self.line: deque[tuple[int, asyncio.Future[None]]] = deque()


class BodyRoom:
    """Of one gateway process. Bodies beyond the room wait in line, unread."""

    def __init__(
        self, room_bytes: int = ROOM_BYTES, *, most_waiting: int = MOST_WAITING, patience_s: float = PATIENCE_S
    ) -> None:
        self._room_bytes = room_bytes
        self._most_waiting = most_waiting
        self._patience_s = patience_s
        self._rooms: dict[TenantId, _Room] = {}

    def held(self, tenant_id: TenantId) -> int:
        """Bytes that the tenant's bodies may take now."""
        room = self._rooms.get(tenant_id)
        return 0 if room is None else room.held

    async def enter(self, tenant_id: TenantId, size: int) -> None:
        """Return when a body of so many bytes may be read; `leave` gives its room back. One alone always may.

        Raises:
            RateLimited: too many of the tenant's wait already, or it has waited for too long.
        """
        room = self._rooms.setdefault(tenant_id, _Room())
        if not room.line and self._has(room, size):
            room.held += size
            return
        if len(room.line) >= self._most_waiting:
            raise _crowded()
        granted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        room.line.append((size, granted))
        try:
            async with asyncio.timeout(self._patience_s):
                await granted
        except BaseException as error:
            if granted.done() and not granted.cancelled():
                self.leave(tenant_id, size)
            elif (size, granted) in room.line:  # else it was passed over already
                room.line.remove((size, granted))
                self._let_in(tenant_id, room)
            if isinstance(error, TimeoutError):
                raise _crowded() from None
            raise

    def leave(self, tenant_id: TenantId, size: int) -> None:
        """The body has come whole, or will not come."""
        room = self._rooms[tenant_id]
        room.held -= size
        self._let_in(tenant_id, room)

    def _let_in(self, tenant_id: TenantId, room: _Room) -> None:
        while room.line and self._has(room, room.line[0][0]):
            size, granted = room.line.popleft()
            if not granted.done():
                room.held += size
                granted.set_result(None)
        if not room.held and not room.line:
            self._rooms.pop(tenant_id, None)

    def _has(self, room: _Room, size: int) -> bool:
        return not room.held or room.held + size <= self._room_bytes


def _crowded() -> RateLimited:
    return RateLimited("Too many of your requests' bodies are still on their way; send fewer at once.", retry_after_s=1)
