"""Request bodies: how long one may stall, and what becomes of the rest when the request is refused.

The rest is read off, so that the client gets to read why: a server that answers and closes while the client is writing
makes the kernel reset the connection, and the answer is lost.
"""

import asyncio
from typing import Final

from starlette.types import Message, Receive

from gateway.errors import BodyTooSlow

LIMIT_BYTES: Final = 64 << 20
PATIENCE_S: Final = 10.0
STALL_S: Final = 30.0


async def receive_in_time(receive: Receive) -> Message:
    """The next piece of a body.

    Raises:
        BodyTooSlow: it did not come; whoever holds folders and connections open by sending nothing is cut.
    """
    try:
        async with asyncio.timeout(STALL_S):
            return await receive()
    except TimeoutError as error:
        raise BodyTooSlow(f"The body stalled for {STALL_S:.0f} s; send it again.") from error


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
