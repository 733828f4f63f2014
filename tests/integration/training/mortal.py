"""Workers that can be killed at a given point, many in a run: forked from a process that has torch and the base loaded.

Run as a process. A line of JSON on standard input starts a worker or waits for one; the answer is a line too.
"""

import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from adapter_store.base_model import BaseModel
from adapter_store.blobs import Blobs
from adapter_store.bundle import Staging
from adapter_store.faults import Bounds
from adapter_store.inspector import Inspector
from adapter_store.store import AdapterStore
from gateway.database import open_engine
from training.evaluations import Evaluated
from training.jobs import Saved
from training.queue import Claimed
from training.results import Results
from training.warm_base import Run, StepReport, WarmBase
from training.worker import Options, Worker

POINTS = ("stepping", "stepped", "saving", "uploading", "uploaded", "writing", "publishing", "published")


@dataclass(frozen=True)
class Death:
    """Where the worker dies: at a point of that step or a later one, of the run with that seed (None: any)."""

    point: str
    step: int
    seed: int | None = None

    def at(self, point: str, step: int, seed: int) -> None:
        if point == self.point and step >= self.step and self.seed in (None, seed):
            os.kill(os.getpid(), signal.SIGKILL)


class Pace:
    """A step waits until what was saved before it is stored, as it is with steps that take longer than a write."""

    def __init__(self) -> None:
        self._pending = 0
        self._changed = threading.Condition()

    def saving(self) -> None:
        with self._changed:
            self._pending += 1

    def saved(self) -> None:
        with self._changed:
            self._pending -= 1
            self._changed.notify_all()

    def wait(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._pending, timeout=10)


class MortalBase(WarmBase):
    """Dies on torch's side; while saving it leaves half a file."""

    def __init__(self, warm: WarmBase, death: Death, pace: Pace, gate: str | None) -> None:
        self.__dict__.update(warm.__dict__)
        self._death = death
        self._pace = pace
        self._gate = gate

    def step(self, runs: Sequence[Run]) -> list[StepReport]:
        while self._gate is not None and not Path(self._gate).exists():
            time.sleep(0.01)
        self._pace.wait()
        for run in runs:
            self._death.at("stepping", run.step + 1, run.spec.hyperparameters.seed)
        reports = super().step(runs)
        for run in runs:
            self._death.at("stepped", run.step, run.spec.hyperparameters.seed)
        return reports

    def save(self, run: Run, folder: Path) -> Path:
        path = super().save(run, folder)
        if self._death.point == "saving" and run.step >= self._death.step:
            path.write_bytes(path.read_bytes()[:100])
            self._death.at("saving", run.step, run.spec.hyperparameters.seed)
        self._pace.saving()
        return path

    def write_adapter(self, run: Run, folder: Path) -> Path:
        self._death.at("writing", run.step, run.spec.hyperparameters.seed)
        return super().write_adapter(run, folder)


@dataclass(frozen=True, slots=True)
class MortalResults(Results):
    """Dies on the database's side."""

    death: Death
    pace: Pace

    async def save(self, claimed: Claimed, step: int, path: Path) -> Saved | None:
        self.death.at("uploading", step, claimed.job.seed)
        saved = await Results.save(self, claimed, step, path)
        self.death.at("uploaded", step, claimed.job.seed)
        self.pace.saved()
        return saved

    async def succeed(self, claimed: Claimed, made: Evaluated) -> None:
        step = int(made.adapter.name.rpartition("-")[2])
        self.death.at("publishing", step, claimed.job.seed)
        await Results.succeed(self, claimed, made)
        self.death.at("published", step, claimed.job.seed)


async def work(order: dict[str, Any], base: BaseModel, warm: WarmBase) -> None:
    """Trains until SIGTERM; by a clock that is `ahead_s`, so that the leases of those who died are over.

    No step is taken before there is a file `gate`, if that is given: the worker has one job then.
    """
    os.environ.update(order["environment"])
    death, pace = Death(**order["death"]), Pace()
    engine, inspector = open_engine(order["database_url"]), Inspector(base, Bounds())
    blobs = Blobs.open(order["blobs_url"])
    store = AdapterStore(engine, blobs, inspector)
    staging = Staging(Path(order["home"]) / "training")

    def clock() -> float:
        return time.time() + float(order["ahead_s"])

    results = MortalResults(engine, blobs, store, staging, clock, death, pace)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    options = Options(order["name"], base.fingerprint, save_every_s=0.0, look_every_s=0.05, stop_s=20)
    try:
        await Worker(results, lambda: MortalBase(warm, death, pace, order["gate"]), options).run(stopping)
    finally:
        await inspector.close()
        await engine.dispose()


def _forked(run: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        run()
        status = 0
    finally:
        os._exit(status)


def main(folder: str) -> NoReturn:
    base = BaseModel.read(Path(folder), name="small-base")
    warm = WarmBase(Path(folder), fingerprint=base.fingerprint, device="cpu", threads=1)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
        else:
            answer = _forked(lambda order=order: asyncio.run(work(order, base, warm)))  # type: ignore[misc]
        print(answer, flush=True)  # noqa: T201  the answer
    sys.exit()


if __name__ == "__main__":
    main(sys.argv[1])
