"""Processes as /proc tells of them: who listens, what they cost, where they run (Linux)."""

import os
import platform
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PROC = Path("/proc")
LISTEN = "0A"


def listeners(port: int) -> set[int]:
    """Pids of the processes that listen on the TCP port, and of their descendants."""
    sockets = _listening_sockets(port)
    parents: dict[int, int] = {}
    pids = set()
    for process in PROC.iterdir():
        if process.name.isdigit():
            with suppress(OSError):  # it may end while we look
                pid = int(process.name)
                parents[pid] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                if any(str(file.readlink()) in sockets for file in (process / "fd").iterdir()):
                    pids.add(pid)
    return with_descendants(pids, parents)


def with_descendants(pids: set[int], parents: dict[int, int]) -> set[int]:
    """`parents`: pid → parent's pid."""
    found = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def _listening_sockets(port: int) -> set[str]:
    found = set()
    for table in ("tcp", "tcp6"):
        for line in (PROC / "net" / table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and int(fields[1].rpartition(":")[2], 16) == port:
                found.add(f"socket:[{fields[9]}]")
    return found


def cpu_ns(pids: Collection[int]) -> int:
    """Time that the processes' threads have run so far."""
    total = 0
    for pid in pids:
        for task in (PROC / str(pid) / "task").glob("*/schedstat"):
            with suppress(OSError):
                total += int(task.read_text().split()[0])
    return total


def busy_ns(cores: Collection[int]) -> int:
    """Time that the cores have worked so far, for whomever; counted in ticks of a hundredth of a second."""
    ticks = 0
    names = {f"cpu{core}" for core in cores}
    for line in (PROC / "stat").read_text().splitlines():
        name, *fields = line.split()
        if name in names:
            user, nice, system, _idle, _iowait, irq, softirq, steal = (int(field) for field in fields[:8])
            ticks += user + nice + system + irq + softirq + steal
    return ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")


class Others:
    """Processes without a part, or another machine, that take the cores; `ours_ns` tells the CPU time of the rest."""

    def __init__(self, cores: Collection[int], ours_ns: Callable[[], int]) -> None:
        self._cores, self._ours_ns = cores, ours_ns
        self._begin, self._busy, self._ours = time.monotonic_ns(), busy_ns(cores), ours_ns()

    def share(self) -> float:
        """Theirs, of all the cores' time since this was made."""
        others_ns = busy_ns(self._cores) - self._busy - (self._ours_ns() - self._ours)
        return max(0.0, others_ns / (time.monotonic_ns() - self._begin) / len(self._cores))


def rss_mib(pid: int) -> float:
    """Resident memory of one process."""
    found = re.search(r"^VmRSS:\s+(\d+) kB", (PROC / str(pid) / "status").read_text(), re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0


def machine() -> dict[str, object]:
    """Where figures come from."""
    names = re.search(r"^model name\s*: (.+)$", (PROC / "cpuinfo").read_text(), re.MULTILINE)
    return {
        "cpu": names[1] if names else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def two_cores() -> tuple[int, int]:
    """One for what is measured, one for who measures; the same where the machine has only one."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[-1] if len(allowed) < 2 else allowed[1]


@contextmanager
def niceness(value: int) -> Iterator[None]:
    """Of what is started inside; where the kernel schedules by session, of the session's processes too.

    Raises:
        PermissionError: less than 0 is for root.
    """
    group = PROC / "self/autogroup"
    before = group.read_text().rpartition(" ")[2] if group.exists() else "0"  # "/autogroup-7 nice 0"
    own = os.getpriority(os.PRIO_PROCESS, 0)
    set_niceness(value, str(value), group)
    try:
        yield
    finally:
        set_niceness(own, before, group)


def set_niceness(own: int, session: str, group: Path) -> None:
    os.setpriority(os.PRIO_PROCESS, 0, own)
    if group.exists():
        group.write_text(session)


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """What is started inside runs on that core alone: a child inherits it with its first instruction."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
