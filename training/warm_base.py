"""The side of a worker that needs torch: one base, kept warm, and the runs of whichever jobs are leased.

A base in four bits is another in memory: what no run wants is let go before another is loaded. Every call
blocks, and all of them are made in one thread: torch's number of threads is set for each thread on its own.
"""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final
from weakref import WeakSet

from pydantic import ValidationError
from transformers import AutoTokenizer

from training import dataset
from training.dataset import DatasetInvalid, NoGenerationMask, Pair, Row
from training.engine import Engine, Run, Spec, StepReport
from training.evaluation import EvaluationReport, evaluate_adapter
from training.failures import TrainingFailed
from training.hyperparameters import Hyperparameters, Quantization
from training.jobs import JobError, Method
from training.material import Material, Refused, job_error

__all__ = ["Run", "StepReport", "WarmBase"]


MOST_CHECKPOINTS: Final = 10
"""Of one job: each is a version, which is kept, proved, and counts for its tenant's quota."""


class WarmBase:
    """A base that runs are begun on, stepped together, saved and written."""

    def __init__(
        self, folder: Path, *, fingerprint: str, device: str | None = None, threads: int | None = None
    ) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        self._load = partial(Engine, folder, device=device, threads=threads)
        self._engines: dict[Quantization | None, Engine] = {None: self._load()}
        self._runs: WeakSet[Run] = WeakSet()
        self._device, self._threads = self._engines[None].device, self._engines[None].threads
        self._longest = self._engines[None].longest
        self._fingerprint = fingerprint

    @property
    def means(self) -> str:
        """What the bytes of a result depend on beside the job itself."""
        return f"{self._device.type}, {self._threads} thread{'' if self._threads == 1 else 's'}"

    def begin(self, material: Material) -> Run:
        """The job's run, where it was saved or before its first step. Raises Refused."""
        try:
            hp = Hyperparameters(**material.recipe)
        except ValidationError as error:
            raise Refused(JobError("invalid_hyperparameters", str(error), "hyperparameters")) from error
        rows = self._rows(material.training_file, material.method, hp, "training_file")
        validation = (
            []
            if material.validation_file is None
            else self._rows(material.validation_file, material.method, hp, "validation_file")
        )
        spec = Spec(material.method, hp, rows, validation, material.warm_start)
        try:
            run = self._engine(hp.quantization).resume(spec, material.saved)
        except (TrainingFailed, MemoryError) as error:
            raise Refused(job_error(error)) from error
        self._runs.add(run)
        return run

    def step(self, runs: Sequence[Run]) -> list[StepReport]:
        """One step of each, in one batch for those that train on the same bits of the base."""
        reports: dict[Run, StepReport] = {}
        for quantization in dict.fromkeys(map(_quantization, runs)):
            taking = [run for run in runs if _quantization(run) == quantization]
            reports.update(zip(taking, self._engine(quantization).step(taking), strict=True))
        return [reports[run] for run in runs]

    def cost(self, run: Run) -> int:
        """Padded tokens of the run's next step."""
        return self._engine(_quantization(run)).cost(run)

    def is_checkpoint(self, run: Run) -> bool:
        """Whether all of the data has been taken once more, and that is one of the last times."""
        epochs_left, steps = divmod(run.total_steps - run.step, run.steps_per_epoch)
        return run.step % run.steps_per_epoch == 0 and epochs_left + bool(steps) < MOST_CHECKPOINTS

    def save(self, run: Run, folder: Path) -> Path:
        """The file of the run at rest. Raises OSError; what was there before is whole."""
        return run.save(folder)

    def evaluate(self, run: Run, adapter: Path, previous: Path | None) -> EvaluationReport:
        """The adapter in the folder on the run's validation rows, beside the base and the adapter in `previous`.

        It is asked as it will be served: on the base itself, whatever it was trained on.
        """
        engine = self._engine(None)
        try:
            return evaluate_adapter(engine, self._tokenizer, adapter, run.spec.validation, previous=previous)
        except TrainingFailed:
            if previous is None:
                raise
        return evaluate_adapter(engine, self._tokenizer, adapter, run.spec.validation)  # of another base

    def write_adapter(self, run: Run, folder: Path) -> Path:
        """The run's two files in `folder`, which is made. Raises Refused, OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            run.write_adapter(folder, base_fingerprint=self._fingerprint)
        except TrainingFailed as error:
            raise Refused(job_error(error)) from error
        return folder

    def _engine(self, quantization: Quantization | None) -> Engine:
        """Raises TrainingFailed: there is none of that kind here."""
        if quantization not in self._engines:
            wanted = set(map(_quantization, self._runs))
            self._engines = {kind: engine for kind, engine in self._engines.items() if kind in wanted}
            self._engines[quantization] = self._load(quantization=quantization)
        return self._engines[quantization]

    def _rows(self, path: Path, method: Method, hp: Hyperparameters, param: str) -> Sequence[Row] | Sequence[Pair]:
        length = min(hp.max_length, self._longest)
        try:
            if method == "dpo":
                return dataset.load_pairs(path, self._tokenizer, max_length=length)
            return dataset.load(path, self._tokenizer, max_length=length)
        except DatasetInvalid as error:
            raise Refused(JobError(f"invalid_{param}", str(error), param)) from error
        except NoGenerationMask as error:
            raise Refused(JobError("base_not_trainable", str(error))) from error
        except MemoryError as error:
            raise Refused(JobError("out_of_memory", "the file does not fit into memory: split it", param)) from error


def _quantization(run: Run) -> Quantization | None:
    return run.spec.hyperparameters.quantization
