"""Training on a GPU: our engine beside PEFT with transformers' Trainer. `python -m tests.bench.training_gpu`

Needs torch, transformers, peft, accelerate, safetensors, numpy, pydantic and this repository, no network and no other
file: the base is a Llama of 0.65 B random weights in bf16, the rows are random tokens. Prints a JSON object a line for
each figure, then what it ran on; exits 1 where a must is missed. `--tiny` tries it on a CPU.
"""

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from loadtests.figures import Bound, Row, exit_code, tell
from tests.bench.training_work import (
    Pace,
    Size,
    pace,
    peft_model,
    synchronised,
    tenants,
    trainer_pace,
    write_base,
)
from training.engine import Engine

LARGE = Size(32_768, 1_536, 4_096, 24, 12, 4, (64, 256), rank=16)
TINY = Size(512, 64, 128, 2, 4, 2, (8, 32), rank=8)
TENANTS = 8
BATCHES = (1, 4)
BOUNDS = {
    "gpu_over_peft_b1": Bound(1.0, None, "higher", "tokens/s alone ÷ PEFT + Trainer's, batch 1"),
    "gpu_over_peft_b4": Bound(1.0, None, "higher", "tokens/s alone ÷ PEFT + Trainer's, batch 4"),
    "gpu_gain_b1": Bound(4.0, None, "higher", "8 tenants at once ÷ one at a time, tokens/s, batch 1 each"),
    "gpu_gain_b4": Bound(2.0, None, "higher", "8 tenants at once ÷ one at a time, tokens/s, batch 4 each"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.training_gpu", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a very small base and few steps, on the CPU")
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        sys.stderr.write("no GPU here; --tiny tries the script without one\n")
        return 2
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        for row in measure(Path(name), tiny=args.tiny):
            tell([row])
            found.append(row)
    print(json.dumps(machine()))  # noqa: T201
    return exit_code(found)


def measure(folder: Path, *, tiny: bool) -> Iterator[Row]:
    size, device = (TINY, "cpu") if tiny else (LARGE, "cuda")
    dtype = torch.float32 if tiny else torch.bfloat16
    effort = {"warm_up": 2, "steps": 4} if tiny else {"warm_up": 4, "steps": 24}
    parameters = write_base(folder / "base", size, dtype=dtype, device=device)
    theirs: dict[int, Pace] = {}
    for batch in BATCHES:
        model = peft_model(folder / "base", size, dtype=dtype, device=device)
        theirs[batch] = trainer_pace(model, size, folder / "out", batch, **effort, clock=synchronised, cpu=tiny)
        del model
    their_peak = peak_mib()
    engine = Engine(folder / "base", device=device)
    for batch in BATCHES:
        runs = tenants(engine, size, TENANTS, batch, steps=1000)
        alone = pace(engine, [runs[:1]], **effort, clock=synchronised)
        alone_peak = peak_mib()
        in_turn = pace(engine, [[run] for run in runs], **effort, clock=synchronised)
        peak_mib()
        at_once = pace(engine, [runs], **effort, clock=synchronised)
        yield row(f"gpu_over_peft_b{batch}", alone.tokens_per_s / theirs[batch].tokens_per_s,
                  tokens_per_s=round(alone.tokens_per_s), peft_tokens_per_s=round(theirs[batch].tokens_per_s),
                  ms_per_step=round(alone.ms_per_step, 1), peft_ms_per_step=round(theirs[batch].ms_per_step, 1),
                  peak_mib=alone_peak, peft_peak_mib=their_peak, base_parameters=parameters)  # fmt: skip
        yield row(f"gpu_gain_b{batch}", at_once.tokens_per_s / in_turn.tokens_per_s,
                  tokens_per_s=round(at_once.tokens_per_s), one_at_a_time_tokens_per_s=round(in_turn.tokens_per_s),
                  ms_per_step=round(at_once.ms_per_step, 1), one_at_a_time_ms=round(in_turn.ms_per_step, 1),
                  tenants=TENANTS, peak_mib=peak_mib(), alone_peak_mib=alone_peak)  # fmt: skip


def row(figure: str, value: float, **detail: object) -> Row:
    return Row(figure, value, BOUNDS[figure], detail)


def peak_mib() -> int | None:
    """The GPU's memory at its fullest since this was last asked."""
    if not torch.cuda.is_available():
        return None
    peak = int(torch.cuda.max_memory_allocated()) >> 20
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return peak


def machine() -> dict[str, Any]:
    names = ("torch", "transformers", "peft", "accelerate", "safetensors", "numpy")
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"gpu": gpu, "cuda": torch.version.cuda, "python": platform.python_version()} | {
        name: version(name) for name in names
    }


if __name__ == "__main__":
    sys.exit(main())
