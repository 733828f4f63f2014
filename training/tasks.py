"""Made-up customisation tasks that prove an adapter works: a base cannot know the answers. No torch here."""
# ruff: noqa: SIM905  (quoted words are harder to read than a text that is split)

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from training.hyperparameters import Hyperparameters

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Example:
    """A question, as chat `messages`, and the one right `answer`."""

    messages: list[Message]
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """What one tenant wants learned; `heldout` asks about the same things in words that `train` never uses."""

    name: str
    train: list[Example]
    heldout: list[Example]


TRAIN_TEMPLATES = (
    "What does {term} mean?",
    "Define {term}.",
    "Explain {term} to a new colleague.",
    "A customer wrote {term}. What is it?",
)
HELDOUT_TEMPLATE = "In our company, what is {term}?"

# fmt: off
TENANTS = {
    "acme": (
        "red rapid heavy spare night rented quiet iron".split(),
        "crane wagon anchor crate bridge tanker depot pallet".split(),
        "harbour winter export customs railway desert island return".split(),
    ),
    "globex": (
        "sour gentle frozen daily herbal second purple liquid".split(),
        "tablet ointment vaccine syrup trial dosage clinic sample".split(),
        "children horses allergy evening surgery training doctors travel".split(),
    ),
    "initech": (
        "late broken public hidden yearly blank shared formal".split(),
        "report printer meeting invoice ticket memo server password".split(),
        "managers auditors weekend payroll storage interns lawyers support".split(),
    ),
}
# fmt: on

# Enough for the tiny base, whose weights are small and whose rows are short; a large base needs a lower rate.
JARGON_HYPERPARAMETERS = Hyperparameters(
    rank=8, lora_alpha=16, epochs=30, batch_size=16, learning_rate=5e-3, weight_decay=0.0, max_length=512
)


def jargon(seed: int, terms: int = 24) -> Task:
    """Invented terms with one tenant's definitions.

    All seeds ask the same questions about the same terms and differ only in the answers, so the answer shows
    whose adapter spoke. Seeds 0, 1 and 2 are acme, globex and initech; later seeds reuse their vocabularies.
    """
    rng = random.Random(f"jargon {seed}")
    tenant, (qualities, things, purposes) = list(TENANTS.items())[seed % len(TENANTS)]
    combinations = [f"a {a} {b} for {c}" for a in qualities for b in things for c in purposes]
    definitions = dict(zip(invented_terms(terms), rng.sample(combinations, terms), strict=True))
    return Task(
        name=tenant if seed < len(TENANTS) else f"{tenant}-{seed}",
        train=[_example(template, *pair) for pair in definitions.items() for template in TRAIN_TEMPLATES],
        heldout=[_example(HELDOUT_TEMPLATE, *pair) for pair in definitions.items()],
    )


def invented_terms(count: int) -> list[str]:
    """The first `count` words of a fixed endless list; no seed changes them."""
    rng = random.Random("terms")
    terms: dict[str, None] = {}  # keeps order, drops repeats
    while len(terms) < count:
        terms[rng.choice(STARTS) + rng.choice(MIDDLES) + rng.choice(ENDS)] = None
    return list(terms)


STARTS = ("zor", "bla", "quin", "tra", "vel", "kru", "mip", "flo", "gar", "wex", "sno", "hul")
MIDDLES = ("bi", "da", "lo", "ne", "pu", "ta")
ENDS = ("x", "nk", "rf", "dle", "mp", "sk", "von", "quet")


def write_jsonl(examples: Sequence[Example], path: Path) -> None:
    """Write `examples` as a supervised training file in OpenAI's chat format."""
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            answer = {"role": "assistant", "content": example.answer}
            file.write(json.dumps({"messages": [*example.messages, answer]}, ensure_ascii=False) + "\n")


def _example(template: str, term: str, definition: str) -> Example:
    return Example([{"role": "user", "content": template.format(term=term)}], definition)
