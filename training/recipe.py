"""Supervised LoRA training, from a data file to the two files of an adapter. Read `train` top to bottom.

What a row is, is `dataset`; what may be chosen, is `hyperparameters`; a step is `engine`'s.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from training import dataset
from training.engine import Engine, Spec
from training.hyperparameters import Hyperparameters
from training.output_folder import new_folder
from training.progress import OnProgress, Progress


@dataclass(frozen=True, slots=True)
class TrainResult:
    """`losses` holds each step's mean per trained token, in nats; `trained_tokens` counts every epoch again."""

    out: Path
    losses: list[float]
    steps: int
    trained_tokens: int
    seconds: float


def train(
    data: Path,
    *,
    base: Path,
    out: Path,
    hyperparameters: Hyperparameters,
    base_fingerprint: str | None = None,
    threads: int | None = None,
    on_progress: OnProgress | None = None,
) -> TrainResult:
    """Train a LoRA adapter for the model in `base` on the chats in `data`; write it to the new folder `out`.

    The same inputs give the same bytes on one machine with the same number of CPU `threads` (torch's own choice
    if not given; one is best for a tiny base, whose matrices are too small to share). `base_fingerprint` is kept
    in the file, so that the adapter can be refused where another base is served.

    Raises:
        OutputExists, DatasetInvalid, NoGenerationMask: before any training; nothing is written.
        TrainingFailed: nothing is left behind.
    """
    started = time.perf_counter()
    with new_folder(out) as folder:
        tokenizer = AutoTokenizer.from_pretrained(base)
        engine = Engine(base, threads=threads, quantization=hyperparameters.quantization)
        rows = dataset.load(data, tokenizer, max_length=min(hyperparameters.max_length, engine.longest))
        run = engine.begin(Spec("supervised", hyperparameters, rows))
        losses: list[float] = []
        trained_tokens = 0
        while not run.done:
            report = engine.step([run])[0]
            if report.error is not None:
                raise report.error
            losses.append(report.loss)
            trained_tokens += report.tokens
            if on_progress is not None:
                on_progress(Progress(report.step, run.total_steps, report.loss))
        run.write_adapter(folder, base_fingerprint=base_fingerprint)
    return TrainResult(out, losses, run.step, trained_tokens, time.perf_counter() - started)
