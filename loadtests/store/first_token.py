"""From an upload's first byte to the first token of the adapter that it brings, on a real engine.

Settings are the defaults, proof of effect included. After its first token each adapter is proved at once, instead of
some seconds after its publish, and the next upload begins when that is over: else its proof would run while another
upload is measured.
"""

import os
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Final

import httpx

from loadtests.figures import Row
from loadtests.overhead.stack import CannotMeasureError, free_port, running
from loadtests.store import programs
from loadtests.store.adapters import WIDE, write_adapter
from loadtests.store.client import Connection, connected
from loadtests.store.gateway import good, new_tenant
from loadtests.store.report import percentile, row

BASE_NAME: Final = "wide"
BUCKET: Final = "tailor"
IN_MEMORY: Final = {"MOTO_S3_DEFAULT_KEY_BUFFER_SIZE": str(1 << 30)}
"""moto writes what is larger into a temporary file."""
START_S: Final = 400.0
PROOF_S: Final = 120.0
LOOK_S: Final = 0.25
LOADED: Final = re.compile(r"^tailor_adapter_load_seconds_total\{[^}]*\} ([0-9.e+-]+)$", re.MULTILINE)
SETTINGS: Final = {
    "TAILOR_ADAPTER_SLOTS": "2",
    "TAILOR_HOST_ADAPTERS": "2",
    "TAILOR_MAX_LORA_RANK": str(WIDE.rank),
    "TAILOR_MAX_MODEL_LEN": "256",
    "TAILOR_PROBE_DEADLINE_S": "20",
    "TAILOR_LOG_LEVEL": "WARNING",
}


@dataclass(frozen=True, slots=True)
class Stages:
    """One adapter's way in seconds: received; inspected and stored; fetched and verified; in the engine; answered."""

    receive: float
    publish: float
    fetch: float
    load: float
    answer: float

    @property
    def total(self) -> float:
        return float(sum(astuple(self)))


def build_base(folder: Path) -> Path:
    """A real base model, wide enough to need adapters of 100 MB.

    Raises:
        CannotMeasureError: it is not made.
    """
    sizes = [str(size) for size in (WIDE.hidden, WIDE.intermediate, WIDE.layers)]
    programs.run("tests.bench.wide_base", str(folder / BASE_NAME), *sizes)
    return folder / BASE_NAME


def first_token_row(figure: str, folder: Path, base: Path, uploads: int, settings: Mapping[str, str]) -> Row:
    """The figure over so many uploads, each of another adapter, after a first one that counts for nothing.

    Raises:
        CannotMeasureError: the stack does not start, or an upload or its answer fails.
    """
    folder.mkdir()
    ways: list[Stages] = []
    proofs_s: list[float] = []
    with up(folder, base, settings) as stack, stack.tenant() as tenant:
        for seed in range(uploads + 1):
            ways.append(stack.way(tenant, folder / "adapter", seed))
            proofs_s.append(stack.prove(tenant, seed))
    del ways[0], proofs_s[0]
    totals = [way.total for way in ways]
    stages = {
        f"{stage.name}_p50_s": round(statistics.median(getattr(way, stage.name) for way in ways), 3)
        for stage in fields(Stages)
    }
    return row(
        figure, percentile(totals, 0.95), uploads=uploads, p50_s=round(statistics.median(totals), 3),
        worst_s=round(max(totals), 3), **stages, proof_p50_s=round(statistics.median(proofs_s), 3),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Running:
    """A whole stack that answers."""

    home: Path
    port: int
    operator_port: int

    @contextmanager
    def tenant(self) -> Iterator[Connection]:
        """A new tenant's connection."""
        with connected(self.port, new_tenant(self.port, self.home)) as connection:
            yield connection

    def way(self, tenant: Connection, folder: Path, seed: int) -> Stages:
        """Of one adapter, which the next one takes the place of on this side."""
        shutil.rmtree(folder, ignore_errors=True)
        files = write_adapter(folder, WIDE, BASE_NAME, seed=seed)
        before = self._load_s()
        name = _name(seed)
        published = good(tenant.publish(name, files))
        answered = good(tenant.first_token(name))
        load = self._load_s() - before
        return Stages(
            published.sent_s, published.took_s - published.sent_s, answered.load_s - load, load,
            answered.took_s - answered.load_s,
        )  # fmt: skip

    def prove(self, tenant: Connection, seed: int) -> float:
        """Seconds that the adapter's proof takes, begun now.

        Raises:
            CannotMeasureError: it is not proved, or not in time.
        """
        begin = time.monotonic()
        path = f"/v1/adapters/{_name(seed)}/versions/1/proof"
        status = good(tenant.ask("POST", path)).json()["status"]
        while status == "pending":
            if time.monotonic() - begin > PROOF_S:
                raise CannotMeasureError(f"{_name(seed)} is not proved within {PROOF_S:g} s")
            time.sleep(LOOK_S)
            status = good(tenant.ask("GET", path)).json()["status"]
        if status != "proved":
            raise CannotMeasureError(f"{_name(seed)} is {status}")
        return time.monotonic() - begin

    def _load_s(self) -> float:
        text = httpx.get(f"http://127.0.0.1:{self.operator_port}/metrics", trust_env=False).text
        return sum(float(found) for found in LOADED.findall(text))


def _name(seed: int) -> str:
    return f"upload-{seed}"


@contextmanager
def up(folder: Path, base: Path, settings: Mapping[str, str]) -> Iterator[Running]:
    """`tailor up`, until the block ends.

    Raises:
        CannotMeasureError: it does not start.
    """
    home, port, operator_port = folder / "home", free_port(), free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TAILOR_", "OTEL_"))}
    env |= {**SETTINGS, "TAILOR_HOME": str(home), "TAILOR_PORT": str(port), "TAILOR_OPERATOR_PORT": str(operator_port)}
    command = [str(Path(sys.executable).parent / "tailor"), "up", "--base-model", str(base)]
    url = f"http://127.0.0.1:{port}/ready"
    with running(command, url, core=None, log=folder / "up.log", env=env | dict(settings), timeout_s=START_S):
        yield Running(home, port, operator_port)


@contextmanager
def s3(folder: Path) -> Iterator[Mapping[str, str]]:
    """An S3 server on loopback with an empty bucket, all in its memory: settings that make it the blob store."""
    port = free_port()
    folder.mkdir()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    with running(command, f"{url}/moto-api/", core=None, log=folder / "s3.log", env={**os.environ, **IN_MEMORY}):
        if httpx.put(f"{url}/{BUCKET}", trust_env=False).status_code != 200:
            raise CannotMeasureError("the S3 server makes no bucket")
        yield {
            "TAILOR_BLOBS_URL": f"s3://{BUCKET}/blobs",
            "AWS_ENDPOINT_URL": url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "benchmark",
            "AWS_SECRET_ACCESS_KEY": "benchmark",
            "AWS_REGION": "us-east-1",
        }
