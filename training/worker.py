"""A worker: leases jobs from the queue, trains as many of them at once as fit into a batch, writes down what they give.

Two sides. The event loop keeps leases alive, fetches, and writes to the database and the blob store; torch has one
thread, where the base stays loaded. Jobs join and leave between two steps. Read `Worker.run` first.

Until there is a job, nothing here needs torch: `load` is called with the first one.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Final, ParamSpec, TypeVar

from adapter_store.bundle import storage_errors
from adapter_store.errors import StorageError
from training import queue, saved_runs
from training.errors import FileDamaged, FileNotKnown
from training.evaluations import Evaluated
from training.jobs import JobError, Level
from training.lease import SERVER_ERROR, Lease
from training.material import Material, Refused, job_error
from training.queue import Claimed, Metrics, Order
from training.results import Results

if TYPE_CHECKING:
    from training.warm_base import Run, StepReport, WarmBase

P = ParamSpec("P")
T = TypeVar("T")
log = logging.getLogger("tailor.training")
MOST_LOSSES: Final = 2
"""A job whose worker dies once more after these, without the job's getting further, is failed."""
LONGEST_PAUSE_S: Final = 15.0
SAVED: Final = "saved"


@dataclass(frozen=True, slots=True)
class Options:
    """`tokens`: of a batch, padding included, above which no further job is taken in; `held_back`: whose jobs wait."""

    name: str
    base_fingerprint: str
    tokens: int = 4_096
    most_jobs: int = 32
    save_every_s: float = 30.0
    look_every_s: float = 1.0
    lease_s: int = queue.LEASE_S
    renew_every_s: float = 2.0  # so soon an owner's pause or cancellation is heard
    stop_s: float = 20.0
    held_back: queue.HeldBack | None = None


@dataclass(slots=True)
class _Job:
    """One that is being trained here; its files lie in `folder`, which lives as long as the lease."""

    lease: Lease
    run: "Run"
    folder: Path
    writing: asyncio.Lock  # held while anything is written into the folder: it stays for as long
    saved_at: float
    evaluated: Evaluated | None = None
    stepped: int = 0  # at which turn of the worker's it last took part


class Worker:
    """Trains jobs of one base until it is stopped."""

    def __init__(self, results: Results, load: Callable[[], "WarmBase"], options: Options) -> None:
        self._results = results
        self._load = load
        self._options = options
        self._base: WarmBase | None = None
        self._jobs: list[_Job] = []
        self._leases: dict[Lease, asyncio.Task[None]] = {}
        self._torch = ThreadPoolExecutor(1, "torch")
        self._turn = 0
        self._look_at = 0.0
        self._pause_s = options.look_every_s

    @property
    def is_idle(self) -> bool:
        """Whether there is no job here, nor anything to write of one."""
        return not self._jobs and not self._leases

    async def run(self, stopping: asyncio.Event) -> None:
        """Until `stopping`; then every job is saved and given back, in `stop_s` at most."""
        renewing = asyncio.create_task(self._keep_leases())
        try:
            while not stopping.is_set():
                await self._obey()
                await self._take_in()
                if self._jobs:
                    await self._step()
                else:
                    await _either(stopping, self._options.look_every_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._options.stop_s):
                    await self._give_back()
        finally:
            renewing.cancel()
            for task in self._leases.values():
                task.cancel()
            await asyncio.gather(renewing, *self._leases.values(), return_exceptions=True)
            self._torch.shutdown(cancel_futures=True)

    # between steps

    async def _obey(self) -> None:
        """What owners and other workers want of the jobs here."""
        for job in list(self._jobs):
            if job.lease.is_over or job.lease.order in (Order.CANCEL, Order.LOST):
                log.info("job %s is dropped: %s", job.lease.claimed.job.id, job.lease.order.value)
                job.lease.drop()
                self._jobs.remove(job)
            elif job.lease.order is Order.PAUSE:
                await self._put_aside(job)

    async def _take_in(self) -> None:
        """One job more, where a batch has room and there is one; the base is loaded for the first."""
        if monotonic() < self._look_at or not self._has_room():
            return
        self._look_at = monotonic() + self._options.look_every_s
        try:
            options = self._options
            if not await queue.is_work(
                self._results.engine, options.base_fingerprint, self._results.now, held_back=options.held_back
            ):
                return
            if self._base is None:  # before the claim: what goes wrong here is no job's fault
                self._base = await self._in_torch(self._load)
            found = await queue.claim(
                self._results.engine,
                options.name,
                base_fingerprint=options.base_fingerprint,
                now=self._results.now,
                most=1,
                lease_s=options.lease_s,
                most_losses=MOST_LOSSES,
                held_back=options.held_back,
            )
        except StorageError as error:
            log.warning("no job is looked for: %s", error)
            self._look_later()
            return
        self._pause_s = self._options.look_every_s
        for claimed in found:
            self._look_at = 0.0  # there may be more
            await self._begin(claimed)

    def _has_room(self) -> bool:
        if any(job.lease.is_suspect for job in self._jobs) or len(self._jobs) >= self._options.most_jobs:
            return False
        return self._base is None or sum(self._base.cost(job.run) for job in self._jobs) < self._options.tokens

    async def _begin(self, claimed: Claimed) -> None:
        """The job takes part from the next step on, or is failed, or given back where its files cannot be had now."""
        lease, held, writing = Lease(claimed, self._results), AsyncExitStack(), asyncio.Lock()
        folder = (await held.enter_async_context(self._results.staging.stage())).folder
        self._leases[lease] = task = asyncio.create_task(_kept(lease, held, writing))
        task.add_done_callback(lambda _: self._leases.pop(lease, None))
        try:
            material = await self._fetch(claimed, folder)
            run = await self._in_torch(self._warm.begin, material)
            leaks = await asyncio.to_thread(material.leaks) if run.step == 0 else []
        except Refused as error:
            lease.fail(error.error)
        except StorageError as error:
            log.warning("job %s cannot be begun now: %s", claimed.job.id, error)
            lease.give_back()
            self._look_later()
        except Exception:  # one job's, and the others must go on
            log.exception("job %s cannot be begun", claimed.job.id)
            lease.fail(SERVER_ERROR)
        else:
            job = _Job(lease, run, folder, writing, saved_at=monotonic())
            lease.total_steps = run.total_steps
            lease.tell(f"Training from step {run.step} of {run.total_steps}, on {self._warm.means}")
            for leak in leaks:
                lease.tell(f"Validation will look better than it is: {leak}", Level.WARN)
            if run.done:
                self._finish(job, {})
            else:
                self._jobs.append(job)

    async def _fetch(self, claimed: Claimed, folder: Path) -> Material:
        """Raises Refused, StorageError."""
        job = claimed.job
        training, validation, warm_start, saved = (
            folder / name for name in ("training.jsonl", "validation.jsonl", "warm-start", SAVED)
        )
        await self._fetch_file(claimed, job.training_file, training, "training_file")
        if job.validation_file is not None:
            await self._fetch_file(claimed, job.validation_file, validation, "validation_file")
        if job.warm_start is not None and not await self._results.fetch_adapter(claimed, warm_start):
            raise Refused(JobError("model_not_found", "the version to go on from is gone: name another", "model"))
        saved.mkdir()
        if job.saved and not await saved_runs.fetch(self._results.blobs, job.tenant_id, job.saved, saved):
            log.warning("job %s: what was saved of it is gone or damaged: it begins anew", job.id)
        return Material(
            job.method,
            job.recipe,
            training,
            None if job.validation_file is None else validation,
            None if job.warm_start is None else warm_start,
            saved,
        )

    async def _fetch_file(self, claimed: Claimed, file_id: str, path: Path, param: str) -> None:
        try:
            await self._results.fetch_file(claimed, file_id, path)
        except (FileNotKnown, FileDamaged) as error:
            raise Refused(JobError("file_not_found", str(error), param)) from error

    # a step

    async def _step(self) -> None:
        """One step of each job of the batch; those that are done, or failed, leave."""
        taking = self._batch()
        self._turn += 1
        for job, report in zip(taking, await self._stepped(taking), strict=True):
            job.stepped = self._turn
            if report is None:
                self._fail(job, SERVER_ERROR)
            elif report.error is not None:
                self._fail(job, job_error(report.error))
            else:
                await self._after(job, report)

    def _batch(self) -> list[_Job]:
        """Those that have waited longest, as many as fit. One that may end the worker is alone: nobody goes with it."""
        taking: list[_Job] = []
        tokens = 0
        for job in sorted(self._jobs, key=lambda job: (not job.lease.is_suspect, job.stepped)):
            tokens += self._warm.cost(job.run)
            if not taking or tokens <= self._options.tokens:
                taking.append(job)
            if job.lease.is_suspect or tokens >= self._options.tokens:
                break
        return taking

    async def _stepped(self, taking: Sequence[_Job]) -> "list[StepReport | None]":
        """None: that job's step met an error which is not the run's own."""
        try:
            return list(await self._in_torch(self._warm.step, [job.run for job in taking]))
        except Exception:  # whose it is shows when each is alone
            log.exception("a step of %s failed", ", ".join(job.lease.claimed.job.id for job in taking))
        return [None] if len(taking) == 1 else [(await self._stepped([job]))[0] for job in taking]

    async def _after(self, job: _Job, report: "StepReport") -> None:
        told = _metrics(report)
        job.lease.note(told)
        if job.run.done:
            self._jobs.remove(job)
            self._finish(job, _of_checkpoint(told))
            return
        if self._warm.is_checkpoint(job.run):
            await self._checkpoint(job, _of_checkpoint(told))
        if monotonic() - job.saved_at >= self._options.save_every_s and not job.lease.is_saving:
            await self._save(job)

    def _finish(self, job: _Job, metrics: Mapping[str, float | None]) -> None:
        """The run is at rest for good, so its adapter can be written whenever there is room; the others step on."""
        job.lease.succeed(job.run.step, metrics, partial(self._evaluated, job))

    async def _checkpoint(self, job: _Job, metrics: Mapping[str, float | None]) -> None:
        """Written now, for the run goes on; published by the lease."""
        async with job.writing:
            if job.lease.is_over:
                return
            try:
                job.lease.checkpoint(job.run.step, metrics, await self._written(job))
            except (Refused, StorageError) as error:
                job.lease.tell(f"No checkpoint at step {job.run.step}: {error}", Level.WARN)

    async def _written(self, job: _Job) -> Path:
        """The folder of the run's adapter as it is now. Raises Refused, StorageError."""
        with storage_errors():
            return await self._in_torch(self._warm.write_adapter, job.run, job.folder / f"adapter-{job.run.step}")

    async def _evaluated(self, job: _Job) -> Evaluated:
        """The adapter as it will be served, beside its base and what is served now. Raises Refused, StorageError.

        That it cannot be evaluated takes nobody's result away.
        """
        adapter = await self._written(job)
        if job.evaluated is not None or not job.run.spec.validation:
            return job.evaluated or Evaluated(adapter)
        served = job.folder / "served"
        try:
            previous = served if await self._results.fetch_served(job.lease.claimed, served) else None
            report = await self._in_torch(self._warm.evaluate, job.run, adapter, previous)
        except StorageError:
            raise
        except Exception:  # whatever it is, the adapter itself is whole
            log.exception("the result of job %s cannot be evaluated", job.lease.claimed.job.id)
            job.lease.tell("The result could not be evaluated", Level.WARN)
            job.evaluated = Evaluated(adapter)
        else:
            job.lease.tell(report.summary(), Level.WARN if report.is_regression else Level.INFO)
            job.evaluated = Evaluated(adapter, report.as_json(), report.metrics())
        return job.evaluated

    async def _save(self, job: _Job) -> None:
        """Where there is no room to save, the job goes on without."""
        job.saved_at = monotonic()
        async with job.writing:
            if job.lease.is_over:
                return
            job_id, step = job.lease.claimed.job.id, job.run.step
            try:
                path = await self._in_torch(self._warm.save, job.run, job.folder / SAVED)
            except OSError as error:
                log.warning("job %s cannot be saved at step %d: %s", job_id, step, error.strerror)
            except Exception:  # one job's, and the others must go on
                log.exception("job %s cannot be saved at step %d", job_id, step)
            else:
                job.lease.save(step, path)

    async def _put_aside(self, job: _Job) -> None:
        """Saved, and given back for another worker or for its owner, who has asked for a pause."""
        await self._save(job)
        job.lease.give_back()
        self._jobs.remove(job)

    def _fail(self, job: _Job, error: JobError) -> None:
        job.lease.fail(error)
        self._jobs.remove(job)

    async def _give_back(self) -> None:
        for job in list(self._jobs):
            await self._put_aside(job)
        await asyncio.gather(*self._leases.values())

    # beside all that

    async def _keep_leases(self) -> None:
        while True:
            await asyncio.sleep(min(self._options.renew_every_s, self._options.lease_s / 4))
            held = {lease.claimed.job.id: lease for lease in self._leases if not lease.is_over}
            try:
                orders = await queue.renew(
                    self._results.engine,
                    [lease.claimed for lease in held.values()],
                    now=self._results.now,
                    lease_s=self._options.lease_s,
                )
            except StorageError as error:
                log.warning("leases are not renewed: %s", error)
            except Exception:  # without leases nothing that is done here counts
                log.exception("leases are not renewed")
            else:
                for job_id, order in orders.items():
                    held[job_id].order = order

    def _look_later(self) -> None:
        self._look_at = monotonic() + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    @property
    def _warm(self) -> "WarmBase":
        assert self._base is not None
        return self._base

    async def _in_torch(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._torch, partial(work, *args, **kwargs))


async def _kept(lease: Lease, held: AsyncExitStack, writing: asyncio.Lock) -> None:
    """The lease until its end, and what it needs as long."""
    async with held:
        await lease.run()
        async with writing:  # a lease may be lost in the middle of a save
            pass


async def _either(event: asyncio.Event, seconds: float) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()


def _metrics(report: "StepReport") -> Metrics:
    more = {"learning_rate": report.learning_rate, "grad_norm": report.grad_norm}
    validation = report.validation
    if validation is None:
        return Metrics(report.step, report.loss, report.token_accuracy, report.tokens, more=more)
    more |= {"full_valid_loss": validation.loss, "full_valid_mean_token_accuracy": validation.token_accuracy}
    return Metrics(
        report.step,
        report.loss,
        report.token_accuracy,
        report.tokens,
        validation.loss,
        validation.token_accuracy,
        more,
    )


def _of_checkpoint(metrics: Metrics) -> dict[str, float | None]:
    """As OpenAI's checkpoints have them."""
    more = metrics.more or {}
    return {
        "train_loss": metrics.train_loss,
        "train_mean_token_accuracy": metrics.train_accuracy,
        "valid_loss": metrics.valid_loss,
        "valid_mean_token_accuracy": metrics.valid_accuracy,
        "full_valid_loss": more.get("full_valid_loss"),
        "full_valid_mean_token_accuracy": more.get("full_valid_mean_token_accuracy"),
    }
