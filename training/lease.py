"""One job that a worker holds: what is written of it, in order and patiently, until its end or the lease's.

Steps go on meanwhile: while database or blob store are away, what is to be written waits here.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Final

from adapter_store.errors import AdapterRejected, BlobCorrupt, QuotaExceeded, StorageError
from training.errors import LeaseLost
from training.evaluations import Evaluated
from training.jobs import JobError, Level, Told
from training.material import Refused
from training.queue import Claimed, Metrics, Order
from training.results import Results

log = logging.getLogger("tailor.training")
TELL_S: Final = 0.5  # between two writings of steps
FIRST_PAUSE_S: Final = 0.5
LONGEST_PAUSE_S: Final = 15.0
SERVER_ERROR: Final = JobError(
    "server_error", "the job met an error of the server's own: try again, or tell your operator"
)
Errand = Callable[[], Awaitable[None]]


class Lease:
    """`order`: what the job's owner, or another worker, has made of it, as the last renewal told.

    `is_saving`: a save is still on its way.
    """

    def __init__(self, claimed: Claimed, results: Results) -> None:
        self.claimed = claimed
        self.order = Order.GO_ON
        self.total_steps: int | None = None
        self.is_over = False
        self.is_saving = False
        self._results = results
        self._metrics: list[Metrics] = []
        self._told: list[Told] = []
        self._told_step = 0
        self._errands: deque[Errand] = deque()
        self._wake = asyncio.Event()

    @property
    def is_suspect(self) -> bool:
        """Whether the job has ended workers, and has not got further since: it may be the one that does that."""
        return self.claimed.job.losses > 0 and self._told_step <= self.claimed.job.step

    def note(self, metrics: Metrics) -> None:
        """A step was done."""
        self._metrics.append(metrics)

    def tell(self, message: str, level: Level = Level.INFO) -> None:
        self._told.append(Told(message, level))

    def save(self, step: int, path: Path) -> None:
        """From here any worker goes on. Not while another one `is_saving`."""
        self.is_saving = True
        self._send(partial(self._save, step, path))

    def checkpoint(self, step: int, metrics: Mapping[str, float | None], adapter: Path) -> None:
        self._send(partial(self._checkpoint, step, metrics, adapter))

    def succeed(
        self, step: int, metrics: Mapping[str, float | None], write: Callable[[], Awaitable[Evaluated]]
    ) -> None:
        """`write` gives the adapter, as often as it is asked. Raises Refused, StorageError."""
        self._send(partial(self._succeed, step, metrics, write))

    def fail(self, error: JobError) -> None:
        self._send(partial(self._fail, error))

    def give_back(self) -> None:
        """After what was sent before, for another worker, or for its owner who has asked for a pause."""
        self._send(self._give_back)

    def drop(self) -> None:
        """The job is not this worker's any more: nothing of it is written from here on."""
        self._end()
        self._wake.set()

    async def run(self) -> None:
        """Writes what comes until the job's end is written, or the lease is lost."""
        await self._until_over()
        await self._results.forget_if_over(self.claimed)

    async def _until_over(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self.is_over:
            await self._something()
            try:
                await self._write()
                pause_s = FIRST_PAUSE_S
                continue
            except LeaseLost:
                self._end(Order.LOST)
                continue
            except (StorageError, BlobCorrupt) as error:
                log.warning("job %s: %s; tried again in %.1f s", self.claimed.job.id, error, pause_s)
            except Exception:  # one job's, and the others must go on
                log.exception("job %s failed", self.claimed.job.id)
                self._errands.clear()
                self.fail(SERVER_ERROR)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            self._wake.set()

    async def _something(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(TELL_S):
                await self._wake.wait()
        self._wake.clear()

    async def _write(self) -> None:
        await self._tell()
        while self._errands and not self.is_over:
            await self._errands[0]()
            self._errands.popleft()
            await self._tell()

    async def _tell(self) -> None:
        metrics, told = list(self._metrics), list(self._told)
        if self.is_over or not (metrics or told):
            return
        if told:
            await self._results.tell(self.claimed, (), told, self.total_steps)
            del self._told[: len(told)]
        if metrics:
            await self._results.tell(self.claimed, metrics, (), self.total_steps)
            del self._metrics[: len(metrics)]
            self._told_step = metrics[-1].step

    async def _save(self, step: int, path: Path) -> None:
        await self._results.save(self.claimed, step, path)
        self.is_saving = False

    async def _checkpoint(self, step: int, metrics: Mapping[str, float | None], adapter: Path) -> None:
        try:
            await self._results.checkpoint(self.claimed, step, metrics, adapter)
        except (AdapterRejected, QuotaExceeded) as error:
            self.tell(f"No checkpoint at step {step}: {error}", Level.WARN)

    async def _succeed(
        self, step: int, metrics: Mapping[str, float | None], write: Callable[[], Awaitable[Evaluated]]
    ) -> None:
        try:
            made = await write()
            await self._tell()
            await self._results.checkpoint(self.claimed, step, {**metrics, **made.figures}, made.adapter)
            await self._results.succeed(self.claimed, made)
        except Refused as error:
            await self._results.fail(self.claimed, error.error)
        except (AdapterRejected, QuotaExceeded) as error:
            await self._results.fail(self.claimed, _refusal(error))
        self._end()

    async def _fail(self, error: JobError) -> None:
        await self._results.fail(self.claimed, error)
        self._end()

    async def _give_back(self) -> None:
        await self._results.give_back(self.claimed)
        self._end()

    def _end(self, order: Order | None = None) -> None:
        self.order = order or self.order
        self.is_over = True
        self.is_saving = False

    def _send(self, errand: Errand) -> None:
        self._errands.append(errand)
        self._wake.set()


def _refusal(error: AdapterRejected | QuotaExceeded) -> JobError:
    if isinstance(error, QuotaExceeded):
        return JobError("quota_exceeded", str(error))
    return JobError("adapter_rejected", f"what was trained cannot be served: {error}", "hyperparameters")
