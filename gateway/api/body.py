"""Request bodies: how long one may stall, and what becomes of the rest when the request is refused.

The rest is read off, so that the client gets to read why: a server that answers and closes while the client is writing
makes the kernel reset the connection, and the answer is lost.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

from starlette.types import Message, Receive

from gateway.errors import BodyTooSlow

LIMIT_BYTES: Final = 64 << 20
PATIENCE_S: Final = 10.0
STALL_S: Final = 30.0
LEAST_BYTES: Final = 16_384  # in each STALL_S


async def receive_in_time(receive: Receive, stall_s: float = STALL_S) -> Message:
    """The next piece of a body.

    Raises:
        BodyTooSlow: it did not come; whoever holds folders and connections open by sending nothing is cut.
    """
    try:
        async with asyncio.timeout(stall_s):
            return await receive()
    except TimeoutError as error:
        raise BodyTooSlow(f"The body stalled for {stall_s:.0f} s; send it again.") from error


class Body:
    """A large body, piece by piece, from a client that neither stalls nor trickles.

    `more`: whether something is to come. `broken`: the client has gone in the middle of it.
    """

    def __init__(
        self, receive: Receive, *, stall_s: float = STALL_S, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.more = True
        self.broken = False
        self._receive = receive
        self._stall_s = stall_s
        self._clock = clock

    async def pieces(self) -> AsyncIterator[bytes]:
        """Raises BodyTooSlow."""
        since, size = self._clock(), 0
        while self.more:
            try:
                message = await receive_in_time(self._receive, self._stall_s)
            except BodyTooSlow:
                self.more = False  # nothing to wait for
                raise
            if message["type"] == "http.disconnect":
                self.more, self.broken = False, True
                return
            self.more = message.get("more_body", False)
            piece = message.get("body", b"")
            size += len(piece)
            if self._clock() - since > self._stall_s:
                if self.more and size < LEAST_BYTES:
                    self.more = False
                    raise BodyTooSlow(f"The body came with less than {LEAST_BYTES} bytes in {self._stall_s:.0f} s.")
                since, size = self._clock(), 0
            yield piece

    async def discard(self) -> None:
        """Before a refusal: the client gets to read why."""
        if self.more:
            await discard_body(self._receive)


async def discard_body(receive: Receive) -> None:
    """Throw the rest of a body away, within limits; past them the client sees a broken connection instead."""
    size = 0
    try:
        async with asyncio.timeout(PATIENCE_S):
            while size < LIMIT_BYTES:
                message = await receive()
                size += len(message.get("body", b""))
                if message["type"] == "http.disconnect" or not message.get("more_body"):
                    return
    except TimeoutError:
        return
