"""A server of streams that says in each chunk when its request came and when the chunk was sent.

    python -m loadtests.stamping PORT STEP_US

What a client reports of its times is held against these. With a step of 0 every answer is the same, sent at once: that
costs nearly nothing, so that the client alone is measured.
"""

import asyncio
import sys
from typing import Final

import uvloop

from loadtests.overhead import mock

AT_ONCE_CHUNKS: Final = 32
_MODEL: Final = b"stamping"
_TOKEN: Final = mock.chunked(mock.TOKEN_HEAD % _MODEL + b"%d @%d" % (1 << 46, 1 << 46) + mock.TOKEN_TAIL + b"}\n\n")
_AT_ONCE: Final = (
    mock.STREAM_HEAD
    + _TOKEN * AT_ONCE_CHUNKS
    + mock.chunked(mock.STOP % (_MODEL, b""))
    + mock.chunked(mock.LAST_USAGE % (_MODEL, mock.usage(AT_ONCE_CHUNKS)))
    + mock.DONE
)


class Stamping(mock.MockProtocol):
    """One connection; a chunk's content is `@CAME @SENT `, ns of the monotonic clock."""

    def __init__(self, engine: mock.Engine, ticker: mock.Ticker, step_ns: int) -> None:
        super().__init__(engine, ticker)
        self._step_ns = step_ns

    def _generate(self, body: bytes) -> None:
        if not self._step_ns:
            self._transport.write(_AT_ONCE)
            return
        chunks = mock.CHUNKS.search(body)
        self._model, self._head = _MODEL, mock.TOKEN_HEAD % _MODEL + b"%d @" % mock.now()
        self._left, self._sent = (int(chunks[1]) if chunks else mock.DEFAULT_CHUNKS), 0
        self._usage = bool(mock.USAGE.search(body))
        self._transport.write(mock.STREAM_HEAD)
        self._ticker.add(self._step_ns, self)


async def serve(port: int, step_us: int) -> None:
    """Answer until the process ends."""
    engine, ticker = mock.Engine("stamping"), mock.Ticker()
    server = await asyncio.get_running_loop().create_server(
        lambda: Stamping(engine, ticker, step_us * 1_000), "127.0.0.1", port, backlog=1_024
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2])))
