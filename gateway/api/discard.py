"""Reads off what a client still sends after its request was refused, so that it gets to read why.

A server that answers and closes while the client is writing makes the kernel reset the connection, and the answer is
lost.
"""

import asyncio
from typing import Final

from starlette.types import Receive

LIMIT_BYTES: Final = 64 << 20
PATIENCE_S: Final = 10.0


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
