"""A gateway's protocol without sockets."""

import asyncio
from collections.abc import Callable

import uvicorn
from uvicorn.server import ServerState

from gateway.front import Front
from gateway.protocol import FrontProtocol


class Nowhere(asyncio.Transport):
    """A transport that hands what is written to a function."""

    def __init__(self, on_write: Callable[[bytes], None] = lambda data: None) -> None:
        super().__init__()
        self._on_write = on_write

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._on_write(bytes(data))

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass

    def abort(self) -> None:
        pass

    close = abort


def protocol_of(front: Front, on_write: Callable[[bytes], None] = lambda data: None) -> FrontProtocol:
    """A connection to the gateway, made."""
    config = uvicorn.Config(front, log_config=None, access_log=False, proxy_headers=False)
    config.load()
    state = ServerState()
    state.default_headers = [(b"date", b"Wed, 25 Nov 2026 00:00:00 GMT")]
    protocol = FrontProtocol(config=config, server_state=state, app_state={})
    protocol.connection_made(Nowhere(on_write))
    return protocol
