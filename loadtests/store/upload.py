"""One large upload over HTTP: what it adds to the gateway's memory, and how fast it is beside `cp` and `sha256sum`."""

import shutil
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtests.figures import Row
from loadtests.overhead.processes import cpu_ns, forget_peak, peak_rss_mib, rss_mib
from loadtests.overhead.stack import Gateway, fingerprint_of, mock_upstream
from loadtests.store.adapters import WEIGHTS, Shape, write_adapter, write_base
from loadtests.store.client import Connection, connected
from loadtests.store.gateway import good, new_tenant
from loadtests.store.report import row

BASE_NAME: Final = "huge"


@dataclass(frozen=True, slots=True)
class Upload:
    """`copy_s`: cp and sha256sum of the same file; `sent_s`: until the gateway had taken, written and hashed it."""

    size_bytes: int
    copy_s: float
    sent_s: float
    whole_s: float
    cpu_s: float
    added_mib: float


def upload_rows(folder: Path, shape: Shape, rounds: int) -> Iterator[Row]:
    """The figures of so many uploads, each beside a copy of the same file.

    Raises:
        CannotMeasureError: something does not start, or an upload is refused.
    """
    with ExitStack() as held:
        base = write_base(folder / BASE_NAME, shape)
        upstream = held.enter_context(mock_upstream(folder, fingerprint_of(base), core=None))
        settings = {"TAILOR_MAX_LORA_RANK": str(shape.rank)}
        gateway = held.enter_context(Gateway(folder, base, upstream, None, settings).started())
        tenant = held.enter_context(connected(gateway.port, new_tenant(gateway.port, gateway.home)))
        pid = gateway.start.process.pid
        tenant.publish("refused", {"adapter_config.json": base / "config.json"})  # what any upload loads, is loaded
        uploads = [measure(tenant, pid, folder / "adapter", shape, seed) for seed in range(rounds)]
    yield row(
        "upload_rss_mib", max(one.added_mib for one in uploads), each=[round(one.added_mib, 1) for one in uploads]
    )
    yield row(
        "upload_over_copy", statistics.median(one.copy_s / one.sent_s for one in uploads),
        megabytes=round(uploads[0].size_bytes / 1e6), copy_s=[round(one.copy_s, 2) for one in uploads],
        upload_s=[round(one.sent_s, 2) for one in uploads], published_s=[round(one.whole_s, 2) for one in uploads],
        gateway_cpu_s=[round(one.cpu_s, 2) for one in uploads],
    )  # fmt: skip


def measure(tenant: Connection, pid: int, folder: Path, shape: Shape, seed: int) -> Upload:
    """One upload of a new adapter, and one copy of it; odd ones are copied first."""
    files = write_adapter(folder, shape, BASE_NAME, seed=seed)
    weights = files[WEIGHTS]
    try:
        copied_s = copy_s(weights) if seed % 2 else 0.0
        forget_peak(pid)
        before_mib, spent = rss_mib(pid), cpu_ns([pid])
        answer = good(tenant.publish("upload", files))
        added_mib, cpu_s = peak_rss_mib(pid) - before_mib, (cpu_ns([pid]) - spent) / 1e9
        copied_s = copied_s or copy_s(weights)
        return Upload(weights.stat().st_size, copied_s, answer.sent_s, answer.took_s, cpu_s, added_mib)
    finally:
        shutil.rmtree(folder)


def copy_s(file: Path) -> float:
    """Time of `cp` and then `sha256sum` of the copy."""
    copy = file.with_suffix(".copy")
    begin = time.monotonic()
    subprocess.run(["cp", str(file), str(copy)], check=True)
    subprocess.run(["sha256sum", str(copy)], check=True, stdout=subprocess.DEVNULL)
    took_s = time.monotonic() - begin
    copy.unlink()
    return took_s
