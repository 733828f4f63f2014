"""Runs a training that is killed again and again, each time at another moment; tells the SHA-256 of what comes out.

python -m tests.unit.training.killed BASE ROWS FOLDER KILLS

A process of its own, since it forks: what is imported is imported once, and torch has no threads yet.
"""

import hashlib
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from training.dataset import Row
from training.engine import Engine, Spec
from training.hyperparameters import Hyperparameters

MOST_STEPS_APART = 3


def spec(rows: list[Row]) -> Spec:
    hp = Hyperparameters(
        rank=4, batch_size=2, gradient_accumulation_steps=2, epochs=20, learning_rate=1e-2, eval_steps=7, seed=3
    )
    return Spec("supervised", hp, rows, validation=rows[:4])


def train(base: Path, rows: list[Row], folder: Path, told: int) -> None:
    """To the end, from where the checkpoints are; writes a byte after each step."""
    engine = Engine(base, threads=1)
    run = engine.resume(spec(rows), folder / "checkpoints")
    while not run.done:
        engine.step([run])
        run.save(folder / "checkpoints")
        os.write(told, b".")
    run.write_adapter(folder)


def killed_once(base: Path, rows: list[Row], folder: Path, rng: random.Random | None) -> bool:
    """Whether it was killed before it ended; without `rng` nobody kills it."""
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        train(base, rows, folder, told)
        os._exit(0)
    os.close(told)
    steps = rng.randint(1, MOST_STEPS_APART) if rng is not None else sys.maxsize
    while steps and os.read(heard, 1):
        steps -= 1
    if rng is not None:
        time.sleep(rng.random() * 0.05)  # somewhere in a step, or in the writing of a checkpoint
        os.kill(child, signal.SIGKILL)
    os.close(heard)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def tear(folder: Path, rng: random.Random) -> None:
    """Cut the newest checkpoint short, as a power cut may, or flip a bit of it."""
    newest = max(folder.glob("step-*.safetensors"))
    content = bytearray(newest.read_bytes())
    at = rng.randrange(len(content))
    content[at] ^= 1
    newest.write_bytes(content[:at] if rng.random() < 0.5 else content)


def main(base: str, rows: str, folder: str, kills: str) -> None:
    read = [Row(**row) for row in json.loads(Path(rows).read_text())]
    place, rng = Path(folder), random.Random(int(kills))
    place.mkdir()
    killed = torn = 0
    while killed < int(kills) and killed_once(Path(base), read, place, rng):
        killed += 1
        if killed % 2 == 0:
            tear(place / "checkpoints", rng)
            torn += 1
    killed_once(Path(base), read, place, None)
    digest = hashlib.sha256((place / "adapter_model.safetensors").read_bytes()).hexdigest()
    print(json.dumps({"killed": killed, "torn": torn, "sha256": digest}))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
