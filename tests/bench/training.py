"""CPU time of training steps. `python -m tests.bench.training base|engine|trl|gain FOLDER BATCH`

`base` writes the base into FOLDER, a Llama of the tiny base's size with random weights; the others print a JSON object:
milliseconds of a step of one run by the engine, or by TRL's SFTTrainer on the same rows; or of a step of eight runs at
once, and of one of each where the runs are trained one after the other. On one thread, in float32: CPU time is what a
step takes where nothing else runs. The least of several rounds counts, since whatever else runs only ever adds.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from tests.bench.training_work import Size, hyperparameters, pace, peft_model, rows, tenants, write_base
from training.engine import Engine

TINY = Size(1_024, 128, 256, 3, 4, 4, (16, 25), rank=8, trained=0.3)
"""The tiny base, and rows as the jargon task has them."""
TENANTS = 8
ROUNDS, STEPS, WARM_UP = 5, 12, 3


def main(what: str, folder: str, batch: str = "1") -> None:
    torch.set_num_threads(1)
    base = Path(folder)
    if what == "base":
        from training.tiny_base import Recipe, make_tokenizer

        found: dict[str, Any] = {"parameters": write_base(base, TINY, dtype=torch.float32, device="cpu")}
        make_tokenizer(0, Recipe()).save_pretrained(base)
    else:
        found = {"engine": engine_ms, "trl": trl_ms, "gain": gain_ms}[what](base, int(batch))
    print(json.dumps(found))  # noqa: T201


def engine_ms(base: Path, batch: int) -> dict[str, Any]:
    engine = Engine(base, threads=1)
    run = tenants(engine, TINY, 1, batch, steps=1_000)[0]
    return {"ms_per_step": least(engine, [[run]])}


def gain_ms(base: Path, batch: int) -> dict[str, Any]:
    engine = Engine(base, threads=1)
    runs = tenants(engine, TINY, TENANTS, batch, steps=1_000)
    # not step by step in turns: each would find its run's weights out of the processor's caches
    one_by_one = min(sum(round_ms(engine, [[run]]) for run in runs) for _ in range(ROUNDS))
    alone = peak_mib()
    at_once = least(engine, [runs])
    return {"one_by_one_ms": one_by_one, "at_once_ms": at_once, "growth_mib": round(peak_mib() - alone, 1)}


def least(engine: Engine, groups: Sequence[Any]) -> float:
    return min(round_ms(engine, groups) for _ in range(ROUNDS))


def round_ms(engine: Engine, groups: Sequence[Any]) -> float:
    return pace(engine, groups, warm_up=WARM_UP, steps=STEPS, clock=time.process_time).ms_per_step


def trl_ms(base: Path, batch: int) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: object, state: object, control: object, **_: object) -> None:
            times.append(time.process_time())

    steps = WARM_UP + ROUNDS * STEPS
    given = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows(TINY, steps * batch, 0)]
    hp = hyperparameters(TINY, batch, steps)
    with tempfile.TemporaryDirectory() as out:
        arguments = SFTConfig(
            output_dir=out, per_device_train_batch_size=batch, max_steps=steps, learning_rate=hp.learning_rate,
            optim="adamw_torch_fused", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, max_length=None,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=peft_model(base, TINY, dtype=torch.float32, device="cpu"), args=arguments,
            train_dataset=Dataset.from_list(given), processing_class=AutoTokenizer.from_pretrained(base),
            callbacks=[Watch()],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # what this program prints is its figures alone
        trainer.train()
    marks = times[WARM_UP - 1 :: STEPS]
    return {"ms_per_step": 1000 * min(b - a for a, b in pairwise(marks)) / STEPS}


def peak_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


if __name__ == "__main__":
    main(*sys.argv[1:])
