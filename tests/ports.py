"""Ports for processes that listen on one of their own.

Not the kernel's choice: between its answer and the process's start it may give the same port to another test, or to a
client's connection.
"""

import os
import socket
from collections.abc import Iterator
from typing import Final

FIRST: Final = 10_000
EACH: Final = 2_000  # for each process that tests run in


def _own() -> Iterator[int]:
    """This process's, again and again, below those that Linux gives to connections (32768 and up)."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    begin = FIRST + worker % 10 * EACH
    at = os.getpid() % EACH  # another run may be under way
    while True:
        yield begin + at
        at = (at + 1) % EACH


_PORTS: Final = _own()


def free_port() -> int:
    """One that nobody listens on, and no other test will be told."""
    while True:
        port = next(_PORTS)
        with socket.socket() as knock:
            knock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                knock.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port
