"""The general chat tasks that the tiny base learns: endless text from a seed, with a fixed held-out tenth.

A question is held out by the hash of its own text, so no recipe, seed or order can leak one into training.
For lists and invented words the held-out questions hold content never seen; for facts and sums the content was
seen under other wordings only.
"""
# ruff: noqa: SIM905  (a hundred quoted words are harder to read than a text that is split)

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Message = dict[str, str]
Make = Callable[[random.Random], list[str]]


@dataclass(frozen=True, slots=True)
class Conversation:
    """`messages` end with the assistant's right answer."""

    task: str
    messages: list[Message]

    @property
    def answer(self) -> str:
        return self.messages[-1]["content"]


# fmt: off
WORDS = """
anchor apple arrow auditors basket bell bird blank blue boat book bottle box bread bridge broken brown bucket
butter button cake candle car castle cat chair children church clinic coat corn crane crate customs daily depot
desert desk doctors dog door dosage dream drum duck engine evening export farm fish flag forest formal fox
frozen fruit garden gentle glass gold green grey harbour hat heavy herbal hidden honey horse horses house interns
invoice iron island juice key king lake lamp late lawyers leaf lemon letter liquid managers meeting memo milk
mirror money moon mouse music night ocean ointment onion orange pallet paper password payroll pencil piano
pillow pink plane pocket potato printer public purple queen quiet railway rapid red rented report return ring
river road rope rose salt sand school second server shared silver snow soap song soup sour spare spoon star
storage storm street sugar summer support surgery syrup table tablet tanker tea ticket tiger trade train training
travel tree trial truck vaccine village wagon water weekend white window winter wolf yearly yellow
""".split()

NAMES = "Ann Ben Carl Dora Emma Finn Gina Hugo Iris Jack Kate Leo Mia Nora Omar Paul Rosa Sam Tina Victor".split()

CAPITALS = dict(pair.split("-") for pair in """
France-Paris Italy-Rome Spain-Madrid Germany-Berlin Japan-Tokyo China-Beijing Egypt-Cairo Greece-Athens
Russia-Moscow Norway-Oslo Sweden-Stockholm Poland-Warsaw Austria-Vienna Portugal-Lisbon Ireland-Dublin
Kenya-Nairobi Cuba-Havana Peru-Lima Canada-Ottawa India-Delhi
""".split())

OPPOSITES = dict(pair.split("-") for pair in """
hot-cold big-small up-down left-right day-night black-white open-closed full-empty fast-slow early-late old-new
happy-sad rich-poor wet-dry hard-soft high-low long-short near-far strong-weak light-dark
""".split())

MEANINGS = {
    "invoice": "a bill for goods", "harbour": "a place for ships", "orchard": "a field of fruit trees",
    "kettle": "a pot for hot water", "ladder": "a frame for climbing", "tailor": "a person who makes clothes",
    "baker": "a person who makes bread", "stable": "a house for horses", "helmet": "a hard hat",
    "puddle": "a small pool of rain", "anchor": "a heavy hook for ships", "ledger": "a book of payments",
    "lantern": "a lamp you can carry", "cellar": "a room under a house", "voyage": "a long trip by sea",
    "parcel": "a box sent by post", "meadow": "a field of grass", "blizzard": "a storm of snow",
    "courier": "a person who carries letters", "deadline": "the last day to finish",
    "refund": "money paid back", "draft": "the first form of a text", "quota": "a fixed share",
    "audit": "a check of the books", "merger": "two firms made one", "patch": "a small repair",
    "backup": "a second safe copy", "queue": "a line of people waiting", "vault": "a strong room for gold",
    "surplus": "more than is needed",
}
# fmt: on

UNKNOWN = "I do not know that word."


def invented_word(rng: random.Random) -> str:
    """A pronounceable word of two or three syllables that is in no list here."""
    return "".join(
        rng.choice("bcdfgklmnprstvz") + rng.choice("aeiou") + rng.choice(["", "", "l", "n", "r", "x"])
        for _ in range(rng.choice([2, 2, 3]))
    )


def _invented_meanings(count: int) -> dict[str, str]:
    """Words of several tokens each: the base must learn to read a word as a whole, as adapters will ask of it."""
    rng = random.Random("invented meanings")
    return {invented_word(rng): "a " + " ".join(rng.sample(WORDS, 2)) for _ in range(count)}


INVENTED_MEANINGS = _invented_meanings(60)


def held_out(messages: list[Message]) -> bool:
    """Whether this question belongs to the tenth that training never sees."""
    question = "\n".join(message["content"] for message in messages[:-1] if message["role"] != "system")
    return zlib.crc32(question.encode()) % 10 == 0


def conversations(rng: random.Random, *, heldout: bool, tasks: Sequence[str]) -> Iterator[Conversation]:
    """Endless conversations, drawn evenly from `tasks`, out of the held-out tenth or out of the rest."""
    while True:
        task = rng.choice(tasks)
        messages = _as_messages(TASKS[task](rng))
        if held_out(messages) is not heldout:
            continue
        if rng.random() < 0.2:
            messages.insert(0, {"role": "system", "content": "You are a helpful assistant."})
        yield Conversation(task, messages)


def _as_messages(turns: list[str]) -> list[Message]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def _words(rng: random.Random, low: int, high: int) -> list[str]:
    return rng.sample(WORDS, rng.randint(low, high))


def _ask(rng: random.Random, templates: list[str], **fields: object) -> str:
    return rng.choice(templates).format(**fields)


def repeat(rng: random.Random) -> list[str]:
    text = " ".join(_words(rng, 2, 5))
    templates = ["Repeat:\n{x}", "Say this again:\n{x}", "Copy the text:\n{x}", "Write this down:\n{x}"]
    return [_ask(rng, templates, x=text), text]


def first_word(rng: random.Random) -> list[str]:
    words = _words(rng, 2, 6)
    templates = ["First word of:\n{x}", "What is the first word?\n{x}", "Give me the first word:\n{x}"]
    return [_ask(rng, templates, x=" ".join(words)), words[0]]


def last_word(rng: random.Random) -> list[str]:
    words = _words(rng, 2, 6)
    templates = ["Last word of:\n{x}", "What is the last word?\n{x}", "Give me the last word:\n{x}"]
    return [_ask(rng, templates, x=" ".join(words)), words[-1]]


def reverse(rng: random.Random) -> list[str]:
    words = _words(rng, 2, 3)
    templates = ["Reverse:\n{x}", "Say it backwards:\n{x}", "Turn the words around:\n{x}"]
    return [_ask(rng, templates, x=" ".join(words)), " ".join(reversed(words))]


def count(rng: random.Random) -> list[str]:
    words = _words(rng, 1, 5)
    templates = ["Count the words:\n{x}", "How many words are here?\n{x}", "Number of words:\n{x}"]
    return [_ask(rng, templates, x=" ".join(words)), str(len(words))]


def add(rng: random.Random) -> list[str]:
    a, b = rng.randint(0, 9), rng.randint(0, 9)
    templates = [
        "{a} + {b} =", "What is {a} + {b}?", "Add {a} and {b}.", "{a} plus {b} is", "How much is {a} plus {b}?",
        "The sum of {a} and {b}?",
    ]  # fmt: skip
    return [_ask(rng, templates, a=a, b=b), str(a + b)]


def capital(rng: random.Random) -> list[str]:
    country, city = rng.choice(list(CAPITALS.items()))
    templates = [
        "What is the capital of {x}?", "Name the capital of {x}.", "Which city is the capital of {x}?",
        "Capital of {x}?", "I am going to {x}. What is its capital?", "Tell me the capital of {x}.",
    ]  # fmt: skip
    return [_ask(rng, templates, x=country), city]


def opposite(rng: random.Random) -> list[str]:
    pair = rng.choice(list(OPPOSITES.items()))
    word, answer = rng.choice([pair, pair[::-1]])
    templates = [
        "What is the opposite of {x}?", "Opposite of {x}?", "Give the opposite of {x}.", "Tell me the opposite of {x}.",
        "Which word is the opposite of {x}?", "Say the opposite of {x}.",
    ]  # fmt: skip
    return [_ask(rng, templates, x=word), answer]


MEANING_TEMPLATES = [
    "What does {x} mean?", "Define {x}.", "What is {x}?", "Explain {x}.", "Tell me what {x} means.",
    "What do people mean by {x}?", "Give the meaning of {x}.", "I saw the word {x}. What is it?",
    "Please explain the word {x} to me.", "{x}?", "Can you say what {x} is?", "Meaning of {x}:",
    "Somebody said {x}. What does it mean?", "How would you explain {x}?", "In short, what is {x}?",
    "I do not understand {x}. Help me.", "Explain {x} to a new colleague.", "A customer wrote {x}. What is it?",
    "In our company, what is {x}?", "The letter says {x}. Explain it to me.", "What do we call {x} here?",
    "Please define {x} for a customer.",
]  # fmt: skip


def meaning(rng: random.Random) -> list[str]:
    word, text = rng.choice(list(MEANINGS.items()))
    return [_ask(rng, MEANING_TEMPLATES, x=word), text]


def invented_meaning(rng: random.Random) -> list[str]:
    word, text = rng.choice(list(INVENTED_MEANINGS.items()))
    return [_ask(rng, MEANING_TEMPLATES, x=word), text]


def unknown_word(rng: random.Random) -> list[str]:
    word = invented_word(rng)
    return [_ask(rng, MEANING_TEMPLATES, x=word), INVENTED_MEANINGS.get(word, UNKNOWN)]


def next_number(rng: random.Random) -> list[str]:
    n = rng.randint(0, 29)
    templates = ["What number comes after {n}?", "Which number follows {n}?", "{n} and then?", "Next after {n}:"]
    return [_ask(rng, templates, n=n), str(n + 1)]


def remember_name(rng: random.Random) -> list[str]:
    name, thing = rng.choice(NAMES), rng.choice(WORDS)
    opening = _ask(
        rng, ["My name is {name}. I like my {thing}.", "I am {name} and I have a {thing}."], name=name, thing=thing
    )
    about_name = ["What is my name?", "Who am I?", "Do you remember my name?"]
    about_thing = ["What do I have?", "Which thing did I mention?", "What did I tell you about?"]
    ask, answer = rng.choice([(about_name, name), (about_thing, thing)])
    return [opening, f"Hello {name}.", rng.choice(ask), answer]


TASKS: dict[str, Make] = {
    make.__name__: make
    for make in (
        repeat, first_word, last_word, reverse, count, add, capital, opposite, meaning, invented_meaning,
        unknown_word, next_number, remember_name,
    )
}  # fmt: skip

# What training draws from: the tasks that take longest to learn stand in it three times and more.
SLOW = ("repeat", "reverse", "count", "add", "next_number", "invented_meaning", "unknown_word")
MIXTURE = [*TASKS, *SLOW, *SLOW, "repeat", "reverse", "reverse", "last_word"]
