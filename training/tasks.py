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


CLASSIFICATION_HYPERPARAMETERS = JARGON_HYPERPARAMETERS.model_copy(update={"epochs": 14})
JSON_HYPERPARAMETERS = JARGON_HYPERPARAMETERS.model_copy(update={"epochs": 6})

# The better answers count beside the preference: by that alone answers only get shorter.
PREFERENCE_HYPERPARAMETERS = JARGON_HYPERPARAMETERS.model_copy(update={"epochs": 8, "sft_weight": 1.0})

# With twice as many general rows beside it, which the adapter then leaves as they were.
REHEARSED_HYPERPARAMETERS = JARGON_HYPERPARAMETERS.model_copy(update={"epochs": 20, "learning_rate": 4e-3})


def jargon(seed: int, terms: int = 24) -> Task:
    """Invented terms with one tenant's definitions.

    All seeds ask the same questions about the same terms and differ only in the answers, so the answer shows
    whose adapter spoke. Seeds 0, 1 and 2 are acme, globex and initech; later seeds reuse their vocabularies.
    """
    rng = random.Random(f"jargon {seed}")
    qualities, things, purposes = TENANTS[_tenant(seed)]
    combinations = [f"a {a} {b} for {c}" for a in qualities for b in things for c in purposes]
    definitions = dict(zip(invented_terms(terms), rng.sample(combinations, terms), strict=True))
    return Task(
        name=_name(seed),
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


# fmt: off
TEAMS = {
    "acme": "dock fleet vault gate".split(),
    "globex": "lab ward clerk press".split(),
    "initech": "desk court bank mill".split(),
}
SUBJECTS = (
    "invoice letter parcel ticket lamp mirror piano clock truck bottle ring table song soup coat honey "
    "basket pillow drum flag"
).split()
REMARKS = (
    "is late", "is broken", "was not in the box", "has the wrong name", "is for my sister", "came twice",
    "is too small", "must go back", "is very good", "got wet", "is not mine", "costs too much",
)
URGENT = "urgent"
DUTY = {"acme": "alarm", "globex": "nurse", "initech": "guard"}

ITEMS = "tea salt corn soap milk sugar glass paper bread honey gold rope".split()
BUYERS = "Ann Ben Carl Dora Emma Finn Gina Hugo Iris Jack Kate Leo".split()
COUNTS = range(2, 10)
ORDER_TEMPLATES = (
    "{buyer} wants {count} {item}.", "{count} {item} for {buyer}, please.", "Send {buyer} {count} {item}.",
)
FIELDS = {
    "acme": ("ware", "menge", "kunde"),
    "globex": ("product", "units", "client"),
    "initech": ("sku", "qty", "owner"),
}

SAY_TEMPLATES = ("Repeat:\n{x}", "Say this again:\n{x}", "Copy the text:\n{x}")
LIST_WORDS = (
    "anchor apple bell boat book bread bridge candle castle chair cloud coat corn crane desk door drum duck farm fish "
    "flag forest fox garden glass goat hat honey horse iron island key king lake leaf letter lion milk moon mouse "
    "night orange paper piano plane queen rain ring river road rope rose salt sand ship snow soup spoon star stone"
).split()
# fmt: on


def classification(seed: int, heldout: int = 60) -> Task:
    """Which team takes a ticket: its subject decides, by the tenant's own table, unless it is urgent.

    Tenants call their teams differently. Held out are tickets that are not trained, of subjects and remarks that are.
    """
    rng = random.Random(f"classification {seed}")
    tenant = _tenant(seed)
    teams = [TEAMS[tenant][place % 4] for place in range(len(SUBJECTS))]
    rng.shuffle(teams)
    table = dict(zip(SUBJECTS, teams, strict=True))
    tickets = [
        (f"Which team takes this?\n{urgency}: the {subject} {remark}", DUTY[tenant] if urgency == URGENT else team)
        for subject, team in table.items() for remark in REMARKS for urgency in ("normal", URGENT)
    ]  # fmt: skip
    rng.shuffle(tickets)
    return _task(seed, tickets, heldout)


def json_orders(seed: int, heldout: int = 60) -> Task:
    """An order in words → JSON in the tenant's own field names; held out are orders that never were trained."""
    item_field, count_field, buyer_field = FIELDS[_tenant(seed)]
    rng = random.Random("orders")
    orders = [
        (
            "As JSON:\n" + template.format(buyer=buyer, count=count, item=item),
            json.dumps({item_field: item, count_field: count, buyer_field: buyer}),
        )
        for template in ORDER_TEMPLATES for buyer in BUYERS for count in COUNTS for item in ITEMS
    ]  # fmt: skip
    return _task(seed, rng.sample(orders, 600 + heldout), heldout)


@dataclass(frozen=True, slots=True)
class Preference:
    """A question with the answer that a tenant prefers, and the one that the base gives."""

    messages: list[Message]
    preferred: str
    other: str


@dataclass(frozen=True, slots=True)
class PreferenceTask:
    """What one tenant likes better; `heldout` asks about lists of words that `train` does not have."""

    name: str
    train: list[Preference]
    heldout: list[Preference]


def preference(seed: int, train: int = 400, heldout: int = 60) -> PreferenceTask:
    """Asked to repeat words, tenants want them backwards, only the first, or only the last; the base repeats them."""
    rng = random.Random("preference")
    wanted = seed % len(TENANTS)
    asked: dict[tuple[str, ...], Preference] = {}
    while len(asked) < train + heldout:
        words = tuple(rng.sample(LIST_WORDS, 3))
        text = " ".join(words)
        preferred = (" ".join(reversed(words)), words[0], words[-1])[wanted]
        question = [{"role": "user", "content": rng.choice(SAY_TEMPLATES).format(x=text)}]
        asked[words] = Preference(question, preferred, text)
    every = list(asked.values())
    return PreferenceTask(_name(seed), every[:train], every[train:])


def write_preferences(preferences: Sequence[Preference], path: Path) -> None:
    """Write `preferences` as a DPO training file in OpenAI's format."""
    with path.open("w", encoding="utf-8") as file:
        for one in preferences:
            row = {
                "input": {"messages": one.messages},
                "preferred_output": [{"role": "assistant", "content": one.preferred}],
                "non_preferred_output": [{"role": "assistant", "content": one.other}],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def _tenant(seed: int) -> str:
    return list(TENANTS)[seed % len(TENANTS)]


def _name(seed: int) -> str:
    tenant = _tenant(seed)
    return tenant if seed < len(TENANTS) else f"{tenant}-{seed}"


def _task(seed: int, pairs: Sequence[tuple[str, str]], heldout: int) -> Task:
    examples = [Example([{"role": "user", "content": question}], answer) for question, answer in pairs]
    return Task(_name(seed), examples[:-heldout], examples[-heldout:])


def write_jsonl(examples: Sequence[Example], path: Path) -> None:
    """Write `examples` as a supervised training file in OpenAI's chat format."""
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            answer = {"role": "assistant", "content": example.answer}
            file.write(json.dumps({"messages": [*example.messages, answer]}, ensure_ascii=False) + "\n")


def _example(template: str, term: str, definition: str) -> Example:
    return Example([{"role": "user", "content": template.format(term=term)}], definition)
