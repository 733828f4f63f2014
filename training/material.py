"""What a job is made of, and why it cannot be. No torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.datafile import chunks, leakage
from training.failures import LossNotFinite, OutOfMemory, QuantizationMissing, TrainingFailed
from training.jobs import JobError, Method


@dataclass(frozen=True, slots=True)
class Material:
    """All of it on this machine's disk. `saved`: a folder to go on from, empty where there is nothing."""

    method: Method
    recipe: dict[str, Any]
    training_file: Path
    validation_file: Path | None
    warm_start: Path | None
    saved: Path

    def leaks(self) -> list[str]:
        """What training and validation share, in words, for a person to know that the figures are too good."""
        if self.validation_file is None:
            return []
        with self.training_file.open("rb") as training, self.validation_file.open("rb") as validation:
            return [str(finding) for finding in leakage(chunks(training), chunks(validation)).findings]


class Refused(Exception):
    """The job cannot be trained, on this machine or any other; `error` says why."""

    def __init__(self, error: JobError) -> None:
        super().__init__(error.message)
        self.error = error


def job_error(error: TrainingFailed | MemoryError) -> JobError:
    """What a failed run is told as; the message names the step."""
    match error:
        case LossNotFinite():
            return JobError("loss_not_finite", str(error), "hyperparameters")
        case QuantizationMissing():
            return JobError("quantization_missing", str(error), "tailor.quantization")
        case OutOfMemory():
            return JobError("out_of_memory", str(error), "hyperparameters")
        case MemoryError():
            return JobError("out_of_memory", "there is not the memory for this job: choose a smaller rank or batch")
        case _:
            return JobError("training_failed", str(error))
