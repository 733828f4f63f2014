"""Training on this machine for the command: the bridge to `training`, which is imported only when it runs.

torch alone takes seconds and hundreds of MiB, so nothing that serves imports this at start.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from adapter_store.base_model import BaseModel
from gateway.home import ConfigurationError
from gateway.progress_bar import StepDone
from gateway.settings import faults_of

OnProgress = Callable[[StepDone], None]


def train_adapter(
    data: Path,
    base: Path,
    out: Path,
    hyperparameters: Mapping[str, Any],
    on_progress: OnProgress,
    threads: int | None = None,
) -> dict[str, Any]:
    """Train an adapter into the new folder `out`; returns what the run says of itself (losses in nats, seconds).

    Raises:
        ConfigurationError: a hyperparameter is out of its bounds. training's and the store's own errors.
    """
    from training.hyperparameters import Hyperparameters

    try:
        chosen = Hyperparameters(**hyperparameters)
    except ValidationError as error:
        faults = faults_of(error, lambda name: f"--{name.replace('_', '-')}")
        raise ConfigurationError(f"The training run cannot be made so:\n{faults}") from error
    fingerprint = BaseModel.read(base).fingerprint
    _quiet()
    from training.recipe import train

    result = train(
        data,
        base=base,
        out=out,
        hyperparameters=chosen,
        base_fingerprint=fingerprint,
        threads=threads,
        on_progress=on_progress,
    )
    return {
        "path": str(result.out),
        "steps": result.steps,
        "final_loss": result.losses[-1],
        "trained_tokens": result.trained_tokens,
        "seconds": result.seconds,
    }


def blend_adapter(
    adapter: Path,
    base: Path,
    task: Path,
    general: Path,
    *,
    least_task: float | None = None,
    png: Path | None = None,
    threads: int | None = None,
) -> dict[str, Any]:
    """The curve of an adapter's factor, drawn into `png` too, and the factor that was picked.

    Raises:
        ConfigurationError: there is nothing to weigh against each other. training's own errors.
    """
    _quiet()
    from transformers import AutoTokenizer

    from training import dataset
    from training.blend import blend, draw
    from training.engine import Engine

    tokenizer, engine = AutoTokenizer.from_pretrained(base), Engine(base, threads=threads)
    sets = [dataset.load(path, tokenizer, max_length=engine.longest) for path in (task, general)]
    try:
        found = blend(engine, tokenizer, adapter, *sets, least_task=least_task)
    except ValueError as error:
        raise ConfigurationError(f"The adapter cannot be blended: {error}") from error
    if png is not None:
        draw(found, png)
    return {**asdict(found), "kept": list(found.kept)}


def build_tiny_base(out: Path, seed: int, on_progress: OnProgress) -> dict[str, Any]:
    """Build the tiny base into the new folder `out`."""
    from training.output_folder import refuse_taken

    refuse_taken(out)
    _quiet()
    from training.tiny_base import build

    made = build(out, seed=seed, on_progress=on_progress)
    return {
        "path": str(made.path),
        "parameters": made.parameters,
        "heldout_accuracy": made.heldout_accuracy,
        "heldout_accuracy_by_task": made.heldout_accuracy_by_task,
    }


def cached_tiny_base(cache: Path, on_progress: Callable[[], Any]) -> Path:
    """The tiny base of the current recipe, built where it is not there yet.

    `on_progress` is a context manager's factory (`progress_bar`), entered only when there is something to build.
    """
    _quiet()
    from training.tiny_base import give_template, recipe_hash

    out = cache / f"tiny-base-{recipe_hash()}" / "tiny-base"
    if not out.is_dir():
        out.parent.mkdir(parents=True, exist_ok=True)
        with on_progress() as tell:
            build_tiny_base(out, 0, tell)
    give_template(out)
    return out


def _quiet() -> None:
    """transformers draws bars and warns of what is fine here; HF's hub is never asked."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
