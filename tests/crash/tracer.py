"""Runs a child whose file operations can be counted, stopped before any of them, and told apart by what is durable.

ptrace with a seccomp filter: the child, all its threads, Python's as SQLite's and Rust's, stops before each system call
that changes a file, and runs at full speed otherwise. Linux on x86-64, without privileges.

What would survive a power cut is kept as POSIX promises it and no more: a file's content as of its last fsync, a
folder's names as of the folder's own.
"""

import ctypes
import os
import random
import signal
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

SEIZE, CONT, GETREGS, SETREGS = 0x4206, 7, 12, 13
RAX, ORIG_RAX = 10, 15
OPTIONS = 0x8 | 0x80 | 0x100000  # threads too, the filter's stops, killed with the tracer
EVENT_SECCOMP, EVENT_STOP = 7, 128
WALL = 0x40000000
DESCRIPTOR, PATH, AT = "descriptor", "path", "at"
# number: (name, what its first arguments are)
CALLS = {
    1: ("write", DESCRIPTOR), 18: ("pwrite64", DESCRIPTOR), 20: ("writev", DESCRIPTOR), 296: ("pwritev", DESCRIPTOR),
    74: ("fsync", DESCRIPTOR), 75: ("fdatasync", DESCRIPTOR), 77: ("ftruncate", DESCRIPTOR),
    285: ("fallocate", DESCRIPTOR), 326: ("copy_file_range", DESCRIPTOR), 82: ("rename", PATH), 87: ("unlink", PATH),
    83: ("mkdir", PATH), 84: ("rmdir", PATH), 86: ("link", PATH), 257: ("openat", AT), 263: ("unlinkat", AT),
    258: ("mkdirat", AT), 264: ("renameat", AT), 316: ("renameat2", AT), 265: ("linkat", AT),
}  # fmt: skip
SYNCS = ("fsync", "fdatasync")
AT_FDCWD = -100
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
libc.ptrace.restype = ctypes.c_long


class Loss(StrEnum):
    """What is left of a process that was killed, and of the machine's memory."""

    NOTHING = "kill -9: everything written is there"
    UNSYNCED = "power cut: no name and no byte that was not synced"
    BYTES = "power cut: all names, but only bytes that were synced"
    SOME = "power cut: of names and bytes that were not synced some, by chance"


@dataclass(frozen=True)
class Trouble:
    """So many operations from number `first` on fail with this error instead of taking effect."""

    first: int
    count: int
    errno: int

    def covers(self, number: int) -> bool:
        return self.first <= number < self.first + self.count


@dataclass
class Durable:
    """What a power cut would leave below `root`."""

    root: Path
    contents: dict[int, bytes] = field(default_factory=dict)  # inode → bytes at its last fsync
    names: dict[int, dict[str, int]] = field(default_factory=dict)  # folder's inode → name → inode
    folders: set[int] = field(default_factory=set)
    held: list[int] = field(default_factory=list)  # open files: an inode that is still open is not given out again

    def __post_init__(self) -> None:
        for folder, _, files in os.walk(self.root):
            self.sync(Path(folder))
            for name in files:
                self.sync(Path(folder) / name)

    def sync(self, path: Path) -> None:
        try:
            held = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return
        self.held.append(held)
        inode = os.fstat(held).st_ino
        if path.is_dir():
            self.folders.add(inode)
            self.names[inode] = {entry.name: entry.inode() for entry in os.scandir(path)}
            for entry in os.scandir(path):
                if entry.is_dir():
                    self.folders.add(entry.inode())
                else:
                    self._hold(path / entry.name)
        else:
            self.contents[inode] = path.read_bytes()

    def _hold(self, path: Path) -> None:
        try:
            self.held.append(os.open(path, os.O_RDONLY))
        except OSError:
            return

    def write_to(self, target: Path, loss: Loss, seed: int) -> None:
        """Makes the files that are left."""
        chance = random.Random(seed)
        self._write_folder(self.root, self.root.stat().st_ino, target, loss, chance)

    def _write_folder(self, now: Path | None, inode: int, target: Path, loss: Loss, chance: random.Random) -> None:
        target.mkdir()
        current = {entry.name: entry.inode() for entry in os.scandir(now)} if now is not None and now.is_dir() else {}
        kept = self.names.get(inode, {})
        takes_current = loss in (Loss.NOTHING, Loss.BYTES) or (loss == Loss.SOME and chance.random() < 0.5)
        for name, child in sorted((current if takes_current else kept).items()):
            if name.endswith("-shm"):  # memory that SQLite's processes share: made anew by the first
                continue
            here = now / name if now is not None and current.get(name) == child else None
            if child in self.folders or (here is not None and here.is_dir()):
                self._write_folder(here, child, target / name, loss, chance)
                continue
            is_written = loss == Loss.NOTHING or (loss == Loss.SOME and chance.random() < 0.5)
            content = here.read_bytes() if here is not None and is_written else self.contents.get(child, b"")
            (target / name).write_bytes(content)

    def close(self) -> None:
        for held in self.held:
            os.close(held)


def trace(
    work: Callable[[], None],
    root: Path,
    kill_at: int | None,
    on_sync: Callable[[Path], None],
    trouble: Trouble | None = None,
) -> list[str]:
    """Runs `work` in a child; its operations on files below `root`, by name.

    The child is killed before the operation number `kill_at` takes effect. `on_sync` is told of each path that is
    synced, while the child stands still.
    """
    begins, go = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(go)
            os.read(begins, 1)
            _filter()
            work()
        finally:
            os._exit(70)  # `work` ends by itself
    os.close(begins)
    _ptrace(SEIZE, child, OPTIONS)
    os.write(go, b"!")
    os.close(go)
    done: list[str] = []
    for thread in _stops(child):
        event = _event(thread, root)
        if event is None:
            continue
        name, path = event
        if len(done) == kill_at:
            os.kill(child, signal.SIGKILL)
            continue
        if trouble is not None and trouble.covers(len(done)):
            _refuse(thread, trouble.errno)
        done.append(f"{name} {path.relative_to(root)}")
        if name in SYNCS:
            on_sync(path)
    return done


def _stops(child: int) -> Iterator[int]:
    """The threads of the child as each stands before a call; they go on when the caller has looked."""
    while True:
        try:
            thread, status = os.waitpid(-1, WALL)
        except ChildProcessError:
            return
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            if thread == child and os.WIFEXITED(status) and os.WEXITSTATUS(status):
                raise RuntimeError(f"the child ended with {os.WEXITSTATUS(status)}")
            continue
        event, number = status >> 16, os.WSTOPSIG(status)
        if event == EVENT_SECCOMP:
            yield thread
        passed = number if event == 0 and number != signal.SIGTRAP else 0
        try:
            _ptrace(CONT, thread, passed)
        except ProcessLookupError:  # killed meanwhile
            continue


def _event(thread: int, root: Path) -> tuple[str, Path] | None:
    """The call that the thread is about to make, where it changes something below `root`."""
    registers = (ctypes.c_ulonglong * 27)()
    _ptrace(GETREGS, thread, ctypes.addressof(registers))
    number, first, second, third = registers[ORIG_RAX], registers[14], registers[13], registers[12]
    name, kind = CALLS[number]
    if name == "openat" and not third & (os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_RDWR):
        return None
    try:
        if kind == DESCRIPTOR:
            path = Path(f"/proc/{thread}/fd/{first}").readlink()
        elif kind == PATH:
            path = Path(_text(thread, first))
        else:
            at = ctypes.c_int(first & 0xFFFFFFFF).value
            folder = Path(f"/proc/{thread}/cwd" if at == AT_FDCWD else f"/proc/{thread}/fd/{at}")
            path = Path(_text(thread, second))
            path = path if path.is_absolute() else folder.readlink() / path
    except OSError:
        return None
    return (name, path) if path.is_relative_to(root) else None


def _refuse(thread: int, errno: int) -> None:
    """The call is left out, and the thread told that it failed."""
    registers = (ctypes.c_ulonglong * 27)()
    _ptrace(GETREGS, thread, ctypes.addressof(registers))
    registers[ORIG_RAX] = (1 << 64) - 1
    registers[RAX] = (1 << 64) - errno
    _ptrace(SETREGS, thread, ctypes.addressof(registers))


def _text(thread: int, address: int) -> str:
    with Path(f"/proc/{thread}/mem").open("rb", buffering=0) as memory:
        memory.seek(address)
        return memory.read(4096).partition(b"\0")[0].decode()


def _filter() -> None:
    """Every call of CALLS stops for the tracer; threads that are made later inherit it."""
    stop, allow = 0x7FF00000, 0x7FFF0000
    count = len(CALLS)
    program = [struct.pack("<HBBI", 0x20, 0, 0, 0)]  # the call's number
    program += [struct.pack("<HBBI", 0x15, count - index, 0, number) for index, number in enumerate(CALLS)]
    program += [struct.pack("<HBBI", 0x06, 0, 0, allow), struct.pack("<HBBI", 0x06, 0, 0, stop)]
    code = ctypes.create_string_buffer(b"".join(program))
    head = ctypes.create_string_buffer(struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(code)))
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, head, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


def _ptrace(request: int, thread: int, data: int) -> None:
    if libc.ptrace(request, thread, None, data) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"ptrace {request:#x}: {os.strerror(number)}")
