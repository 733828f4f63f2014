"""Ports for processes that listen on one of their own.

Not the kernel's choice: between its answer and the process's start it may give the same port to another process, or to
a connection.
"""

import errno
import fcntl
import itertools
import os
import secrets
import socket
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Final

MINE: Final = 256
"""Ports that stay this process's, whether or not it still listens there."""


class Ports:
    """These, in turn and from anywhere on, and for as long as this process lives no other one's that asks here.

    Linux gives connections those from 32768 on, so lower ones are wanted here. Who has which is in the folder `locks`.
    """

    def __init__(self, ports: range, locks: Path | None = None) -> None:
        at = secrets.randbelow(len(ports))
        self._range = ports
        self._ports: Iterator[int] = itertools.cycle((*ports[at:], *ports[:at]))
        self._folder = locks or Path(tempfile.gettempdir()) / f"tailor-ports-{os.getuid()}"
        self._locks: deque[int] = deque()

    def free(self) -> int:
        """One that nobody listens on, and that is not told again soon.

        Raises:
            OSError: there is none.
        """
        for port in itertools.islice(self._ports, len(self._range)):
            lock = _locked(self._folder, port)
            if lock is None:
                continue
            try:
                with socket.create_server(("127.0.0.1", port)):
                    pass
            except OSError:
                os.close(lock)
                continue
            self._locks.append(lock)
            if len(self._locks) > MINE:
                os.close(self._locks.popleft())
            return port
        first, last = self._range[0], self._range[-1]
        raise OSError(errno.EADDRINUSE, f"each of the ports {first} to {last} is in use or kept by a process that runs")


def _locked(folder: Path, port: int) -> int | None:
    """The descriptor that holds the port's lock; None where another has it."""
    folder.mkdir(mode=0o700, exist_ok=True)
    lock = os.open(folder / str(port), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
