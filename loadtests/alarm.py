"""An alarm on the monotonic clock, right to some ten microseconds; event loops' own timers count milliseconds."""

import asyncio
import ctypes
import os
import time
from collections.abc import Callable
from typing import Final, Protocol

NS: Final = 1_000_000_000
_ABSOLUTE: Final = 1  # TFD_TIMER_ABSTIME


class Alarm(Protocol):
    """Calls back once for each time that is set."""

    def set(self, at_ns: int) -> None:
        """Ring at that time of the monotonic clock, at once if it is past; an earlier setting is forgotten."""

    def close(self) -> None:
        """Ring no more."""


def alarm(loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> Alarm:
    """The best that the system has: a timer of the kernel's on Linux, the loop's own elsewhere."""
    library = ctypes.CDLL(None, use_errno=True)
    return _KernelAlarm(library, loop, ring) if hasattr(library, "timerfd_create") else _LoopAlarm(loop, ring)


class _Setting(ctypes.Structure):
    """`struct itimerspec`."""

    _fields_ = (
        ("every_s", ctypes.c_long),
        ("every_ns", ctypes.c_long),
        ("at_s", ctypes.c_long),
        ("at_ns", ctypes.c_long),
    )


class _KernelAlarm:
    def __init__(self, library: ctypes.CDLL, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._library, self._loop, self._ring = library, loop, ring
        self._file = library.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        loop.add_reader(self._file, self._rings)

    def set(self, at_ns: int) -> None:
        seconds, rest = divmod(max(at_ns, 1), NS)  # 0 would switch it off
        setting = _Setting(0, 0, seconds, rest)
        if self._library.timerfd_settime(self._file, _ABSOLUTE, ctypes.byref(setting), None):
            raise OSError(ctypes.get_errno(), "timerfd_settime failed")

    def _rings(self) -> None:
        try:
            os.read(self._file, 8)
        except BlockingIOError:
            return  # it was set anew between its ringing and our reading
        self._ring()

    def close(self) -> None:
        self._loop.remove_reader(self._file)
        os.close(self._file)


class _LoopAlarm:
    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        self._loop, self._ring = loop, ring
        self._handle: asyncio.TimerHandle | None = None

    def set(self, at_ns: int) -> None:
        self.close()
        self._handle = self._loop.call_later(max(0.0, (at_ns - time.monotonic_ns()) / NS), self._ring)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
