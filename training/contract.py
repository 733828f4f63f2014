"""What a job asks for becomes what the engine is given, and is held against what replicas can serve, before it starts.

A job whose result could not be served is refused with the nearest choice that could. Nothing here needs torch.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from pydantic import ValidationError

from adapter_store.catalog import Version
from training import auto
from training.errors import NotServable, OptionInvalid
from training.hyperparameters import LLAMA_LINEARS, Hyperparameters, Quantization
from training.jobs import Method

Auto = Literal["auto"]
AUTO: Final = "auto"
RANK: Final = 16
ALPHA_PER_RANK: Final = 2
MOST_RATE: Final = 1.0
MICRO_BATCH: Final = 8
"""Most rows in one forward pass; a larger batch is several, and one step all the same."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What replicas serve: the highest rank, and the linear layers of the base by their last names.

    `hidden_size` is the base's; learning rates follow it.
    """

    base_name: str
    max_rank: int
    modules: frozenset[str]
    hidden_size: int


@dataclass(frozen=True, slots=True)
class Choices:
    """OpenAI's hyper-parameters, each a number or "auto"; `beta` counts for DPO alone."""

    n_epochs: int | Auto = AUTO
    batch_size: int | Auto = AUTO
    learning_rate_multiplier: float | Auto = AUTO
    beta: float | Auto = AUTO


@dataclass(frozen=True, slots=True)
class Options:
    """Tailor's own; None leaves the choice to Tailor."""

    rank: int | None = None
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    rslora: bool = False
    packing: bool = False
    eval_steps: int | None = None
    early_stopping_patience: int | None = None
    sft_weight: float | None = None
    quantization: Quantization | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """All in numbers: what is shown in OpenAI's words, and what the engine is given."""

    hyperparameters: dict[str, Any]
    recipe: dict[str, Any]


def settle(
    method: Method,
    choices: Choices,
    options: Options,
    *,
    limits: Limits,
    seed: int,
    statistics: Mapping[str, Any],
    warm_start: Version | None = None,
) -> Settled:
    """`statistics`: of the training file, as its check found them. Raises NotServable, OptionInvalid."""
    if options.sft_weight is not None and method != "dpo":
        raise OptionInvalid("tailor.sft_weight", "it weighs the better answers of a dpo job; this one is supervised")
    shown = _numbers(method, choices, statistics, limits)
    rank = _rank(options, limits, warm_start)
    batch, passes = _passes(shown["batch_size"])
    recipe = {
        "rank": rank,
        "lora_alpha": options.lora_alpha or rank * ALPHA_PER_RANK,
        "rslora": options.rslora,
        "target_modules": _modules(options, limits, warm_start),
        "epochs": shown["n_epochs"],
        "batch_size": batch,
        "gradient_accumulation_steps": passes,
        "learning_rate": _rate(method, shown["learning_rate_multiplier"], limits),
        "packing": options.packing,
        "eval_steps": options.eval_steps,
        "early_stopping_patience": options.early_stopping_patience,
        "seed": seed,
        "beta": shown.get("beta"),
        "sft_weight": options.sft_weight,
        "quantization": options.quantization,
    }
    known = {name: value for name, value in recipe.items() if value is not None}
    try:
        checked = Hyperparameters(**known)
    except ValidationError as error:
        first = error.errors()[0]
        raise OptionInvalid("hyperparameters", f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    return Settled(shown, checked.model_dump(mode="json"))


def _rate(method: Method, multiplier: float, limits: Limits) -> float:
    rate = auto.rate(method, limits.hidden_size)
    if rate * multiplier > MOST_RATE:
        raise OptionInvalid(
            f"method.{method}.hyperparameters.learning_rate_multiplier",
            f"{multiplier:g} is a learning rate of {rate * multiplier:g} on this base: at most {MOST_RATE / rate:g}",
        )
    return rate * multiplier


def check_model(model: str, limits: Limits) -> None:
    """Raises NotServable for what is not the base model that is served."""
    if model != limits.base_name:
        raise NotServable(
            "model",
            f"'{model[:128]}' is not served here, so what is trained on it could not be: the base model is "
            f"'{limits.base_name}'",
            limits.base_name,
        )


def _rank(options: Options, limits: Limits, warm_start: Version | None) -> int:
    if warm_start is not None and options.rank not in (None, warm_start.rank):
        raise NotServable(
            "tailor.rank",
            f"'{warm_start.adapter_name}@{warm_start.number}' has rank {warm_start.rank}, and what goes on from it has "
            "the same",
            warm_start.rank,
        )
    rank = options.rank or (warm_start.rank if warm_start is not None else min(RANK, limits.max_rank))
    if rank > limits.max_rank:
        raise NotServable(
            "tailor.rank", f"rank {rank} could not be served: replicas take up to {limits.max_rank}", limits.max_rank
        )
    return rank


def _modules(options: Options, limits: Limits, warm_start: Version | None) -> list[str]:
    if warm_start is not None:
        own = sorted(warm_start.modules)
        if options.target_modules is not None and sorted(options.target_modules) != own:
            raise NotServable(
                "tailor.target_modules",
                f"'{warm_start.adapter_name}@{warm_start.number}' adapts {', '.join(own)}, and what goes on from it "
                "adapts the same",
                own,
            )
        return own
    if options.target_modules is None:
        return [name for name in LLAMA_LINEARS if name in limits.modules] or sorted(limits.modules)
    unknown = [name for name in options.target_modules if name not in limits.modules]
    if unknown:
        raise NotServable(
            "tailor.target_modules",
            f"the base model has no linear layers named {', '.join(unknown)} that an engine adapts; it has "
            f"{', '.join(sorted(limits.modules))}",
            nearest_modules(options.target_modules, limits.modules),
        )
    return list(dict.fromkeys(options.target_modules))


def nearest_modules(asked: Collection[str], known: Collection[str]) -> list[str]:
    """Those that are meant: what is known, what is spelled nearly so, or all where nothing is left."""
    from difflib import get_close_matches

    ordered = sorted(known)
    found = [name if name in known else next(iter(get_close_matches(name, ordered, n=1)), None) for name in asked]
    return list(dict.fromkeys(name for name in found if name is not None)) or ordered


def _numbers(method: Method, choices: Choices, statistics: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    chosen = auto.choose(
        method,
        examples=int(statistics.get("examples") or 1),
        tokens=(statistics.get("tokens") or {}).get("total"),
        hidden_size=limits.hidden_size,
    )
    shown = {
        "n_epochs": choices.n_epochs,
        "batch_size": choices.batch_size,
        "learning_rate_multiplier": choices.learning_rate_multiplier,
        **({"beta": choices.beta} if method == "dpo" else {}),
    }
    return {name: getattr(chosen, name) if value == AUTO else value for name, value in shown.items()}


def _passes(batch_size: int) -> tuple[int, int]:
    """Rows of a forward pass, and how many of these are a step: a batch is never cut into unequal parts."""
    rows = next(rows for rows in range(min(MICRO_BATCH, batch_size), 0, -1) if batch_size % rows == 0)
    return rows, batch_size // rows
