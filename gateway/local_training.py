"""Training on this machine for the command: the bridge to `training`, which is imported only when it runs.

torch alone takes seconds and hundreds of MiB, so nothing that serves imports this at start.
"""

import os
from collections.abc import Callable, Mapping
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


def build_tiny_base(out: Path, seed: int, on_progress: OnProgress) -> dict[str, Any]:
    """Build the tiny base into the new folder `out`."""
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
