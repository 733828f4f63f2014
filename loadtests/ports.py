"""Ports for processes that listen on one of their own.

Not the kernel's choice: between its answer and the process's start it may give the same port to another process, or to
a connection.
"""

import itertools
import secrets
import socket
from collections.abc import Iterator


class Ports:
    """These, in turn and from anywhere on: others may be at it in the same range.

    Linux gives connections those from 32768 on, so lower ones are wanted here.
    """

    def __init__(self, ports: range) -> None:
        at = secrets.randbelow(len(ports))
        self._ports: Iterator[int] = itertools.cycle((*ports[at:], *ports[:at]))

    def free(self) -> int:
        """One that nobody listens on, and that is not told again soon."""
        while True:
            port = next(self._ports)
            try:
                with socket.create_server(("127.0.0.1", port)):
                    return port
            except OSError:
                continue
