"""The check of a training file at upload: every fault, figures about the data, and what a person should look at.

Streams, so that a file of any size takes the memory of a line and of some bytes a row. Imports no torch and no
transformers. The bytes are a stranger's: run it in a process of its own.
"""

import hashlib
import json
import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

from training import personal_data
from training.rows import (
    MAX_FAULTS,
    Example,
    Fault,
    Message,
    Method,
    Preference,
    RowInvalid,
    numbered_lines,
    parse_line,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

__all__ = ["Fault", "Finding", "Leakage", "Lengths", "Method", "Report", "Statistics", "Tokens", "check", "leakage"]

MAX_EXAMPLES = 1_000_000
MAX_LINES_LISTED = 20
CHUNK_BYTES = 1 << 16
BATCH_CHARACTERS = 1 << 18  # tokenised at a time

FindingKind = Literal["duplicate", "too_long", "blank_text", "blank_line", "email", "phone", "card", "iban"]
LeakKind = Literal["same_row", "same_prompt"]
MESSAGES = {
    "duplicate": "rows that are the same as an earlier one",
    "too_long": "rows of more tokens than fit the base",
    "blank_text": "rows with a message of white space alone",
    "blank_line": "blank lines",
    "email": "rows that seem to hold an e-mail address",
    "phone": "rows that seem to hold a telephone number",
    "card": "rows that seem to hold a payment card's number",
    "iban": "rows that seem to hold a bank account's number (IBAN)",
    "same_row": "rows of the validation file that are in the training file too",
    "same_prompt": "rows of the validation file that ask what a row of the training file asks",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What a person should look at, told by line: never the text itself. `lines` are the first of `count` rows."""

    kind: FindingKind | LeakKind
    count: int
    lines: list[int]

    def __str__(self) -> str:
        listed = ", ".join(map(str, self.lines)) + (", …" if self.count > len(self.lines) else "")
        return f"{MESSAGES[self.kind]}: {self.count} (line {listed})"


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of the rows, in tokens; a preference is as long as its prompt with the longer answer."""

    min: int
    median: int
    p95: int
    max: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of the texts alone, one pass over the data; a chat template adds a few a message.

    `by_role` counts the declarations of tools under "tools". `trained` are those of answers of weight 1, and of
    both answers of a preference.
    """

    total: int
    by_role: dict[str, int]
    trained: int
    lengths: Lengths | None


@dataclass(frozen=True, slots=True)
class Statistics:
    """Figures over the well-formed rows; `tokens` where a tokenizer was given."""

    bytes: int
    lines: int
    examples: int
    messages: int
    messages_by_role: dict[str, int]
    tokens: Tokens | None


@dataclass(frozen=True, slots=True)
class Report:
    """What is known of a file after one reading; not `complete` where the reading ended at too many faults."""

    method: Method | None
    faults: list[Fault]
    complete: bool
    statistics: Statistics
    warnings: list[Finding]

    @property
    def valid(self) -> bool:
        return not self.faults


@dataclass(frozen=True, slots=True)
class Leakage:
    """Rows of a validation file that training sees too; where there are any, its figures are too good."""

    same_row: Finding | None
    same_prompt: Finding | None

    @property
    def findings(self) -> list[Finding]:
        return [finding for finding in (self.same_row, self.same_prompt) if finding is not None]


def chunks(file: BinaryIO) -> Iterator[bytes]:
    """A file in pieces of `CHUNK_BYTES`, whatever its lines."""
    return iter(lambda: file.read(CHUNK_BYTES), b"")


def load_tokenizer(base: Path) -> "Tokenizer":
    """The tokenizer of the base folder `base`, by the library alone, to count with."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check(
    data: Iterable[bytes],
    *,
    method: Method | None = None,
    tokenizer: "Tokenizer | None" = None,
    max_length: int | None = None,
    max_examples: int = MAX_EXAMPLES,
) -> Report:
    """Read a file, given in pieces of any cut, once: for `method`, or for the one that its first row speaks of.

    Ends at `MAX_FAULTS` faults. Rows of more than `max_length` tokens are warned of, if a `tokenizer` counts them.
    """
    reading = _Reading(method, _Counting(tokenizer, max_length), max_examples)
    for number, line in numbered_lines(reading.counted(data)):
        reading.take(number, line)
        if reading.ended:
            break
    return reading.report()


def leakage(training: Iterable[bytes], validation: Iterable[bytes]) -> Leakage:
    """Which rows of `validation` are in `training` too, whole or with the same prompt; faulty lines are passed over."""
    rows: dict[bytes, list[int]] = {}
    prompts: dict[bytes, list[int]] = {}
    for row in _rows(validation):
        rows.setdefault(_digest(_parts(row)), []).append(row.line)
        prompts.setdefault(_digest(_prompt(row)), []).append(row.line)
    same_rows: set[int] = set()
    same_prompts: set[int] = set()
    for row in _rows(training):
        same_rows.update(rows.pop(_digest(_parts(row)), ()))
        same_prompts.update(prompts.pop(_digest(_prompt(row)), ()))
    return Leakage(_finding("same_row", same_rows), _finding("same_prompt", same_prompts - same_rows))


def _rows(data: Iterable[bytes]) -> Iterator[Example | Preference]:
    for number, line in islice(numbered_lines(data), MAX_EXAMPLES):
        with suppress(RowInvalid):
            yield parse_line(number, line)


def _finding(kind: LeakKind, lines: set[int]) -> Finding | None:
    return Finding(kind, len(lines), sorted(lines)[:MAX_LINES_LISTED]) if lines else None


class _Reading:
    """What was learned of the file so far."""

    def __init__(self, method: Method | None, counting: "_Counting", max_examples: int) -> None:
        self._method = method
        self._counting = counting
        self._max_examples = max_examples
        self._bytes = 0
        self._lines = 0
        self._faults: list[Fault] = []
        self._findings: dict[FindingKind, Finding] = {}
        self._messages: Counter[str] = Counter()
        self._digests = array("Q")
        self._line_of_example = array("Q")

    @property
    def ended(self) -> bool:
        """Whether nothing that follows would change the verdict."""
        return len(self._faults) == MAX_FAULTS or len(self._digests) > self._max_examples

    def counted(self, data: Iterable[bytes]) -> Iterator[bytes]:
        for chunk in data:
            self._bytes += len(chunk)
            yield chunk

    def take(self, number: int, line: bytes) -> None:
        self._lines = number
        if not line.strip():
            self._note("blank_line", number)
            return
        try:
            row = parse_line(number, line, self._method)
        except RowInvalid as error:
            self._faults.append(Fault(number, str(error)))
            return
        if len(self._digests) == self._max_examples:
            self._faults.append(Fault(number, f"more than {self._max_examples} rows: split the file"))
        self._method = "dpo" if isinstance(row, Preference) else "supervised"
        self._digests.append(int.from_bytes(_digest(_parts(row))))
        self._line_of_example.append(number)
        self._look_at(row)

    def _look_at(self, row: Example | Preference) -> None:
        messages = list(_messages(row))
        self._messages.update(message["role"] for message in messages)
        texts = [text for message in messages for text in _texts(message)]
        if any(text.isspace() for text in texts):
            self._note("blank_text", row.line)
        for kind in {kind for text in texts for kind in personal_data.kinds_in(text)}:
            self._note(kind, row.line)
        for line in self._counting.take(row):
            self._note("too_long", line)

    def _note(self, kind: FindingKind, line: int) -> None:
        before = self._findings.get(kind, Finding(kind, 0, []))
        self._findings[kind] = Finding(kind, before.count + 1, [*before.lines, line][:MAX_LINES_LISTED])

    def report(self) -> Report:
        ended = self.ended
        if not self._digests and not self._faults:
            self._faults.append(Fault(1, "the file holds no examples"))
        for line in self._counting.finish():
            self._note("too_long", line)
        for line in self._duplicates():
            self._note("duplicate", line)
        return Report(
            method=self._method,
            faults=self._faults,
            complete=not ended,
            statistics=Statistics(
                bytes=self._bytes,
                lines=self._lines,
                examples=len(self._digests),
                messages=self._messages.total(),
                messages_by_role=dict(self._messages),
                tokens=self._counting.tokens(),
            ),
            warnings=[self._findings[kind] for kind in MESSAGES if kind in self._findings],
        )

    def _duplicates(self) -> Iterator[int]:
        """Lines of rows that stood before; sorting takes less memory than a set of all of them."""
        repeated = {digest for digest, following in pairwise(sorted(self._digests)) if digest == following}
        seen: set[int] = set()
        for digest, line in zip(self._digests, self._line_of_example, strict=True):
            if digest in seen:
                yield line
            elif digest in repeated:
                seen.add(digest)


@dataclass(slots=True)
class _Piece:
    """A text to count. Of a row's alternatives the longer one counts for its length."""

    role: str
    text: str
    trained: bool
    alternative: int  # 0: in every one


class _Counting:
    """Counts tokens in batches; without a tokenizer it counts nothing."""

    def __init__(self, tokenizer: "Tokenizer | None", max_length: int | None) -> None:
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._waiting: list[tuple[int, list[_Piece]]] = []
        self._characters = 0
        self._lengths = array("L")
        self._by_role: Counter[str] = Counter()
        self._trained = 0

    def take(self, row: Example | Preference) -> list[int]:
        """Lines of the rows that were counted now and are too long."""
        if self._tokenizer is None:
            return []
        pieces = list(_pieces(row))
        self._waiting.append((row.line, pieces))
        self._characters += sum(len(piece.text) for piece in pieces)
        return self.finish() if self._characters >= BATCH_CHARACTERS else []

    def finish(self) -> list[int]:
        too_long = []
        waiting, self._waiting, self._characters = self._waiting, [], 0
        counts = iter(self._counts([piece.text for _, pieces in waiting for piece in pieces]))
        for line, pieces in waiting:
            length = [0, 0, 0]
            for piece in pieces:
                count = next(counts)
                length[piece.alternative] += count
                self._by_role[piece.role] += count
                self._trained += count * piece.trained
            self._lengths.append(length[0] + max(length[1:]))
            if self._max_length is not None and self._lengths[-1] > self._max_length:
                too_long.append(line)
        return too_long

    def _counts(self, texts: list[str]) -> list[int]:
        if self._tokenizer is None or not texts:
            return []
        return [len(encoded) for encoded in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def tokens(self) -> Tokens | None:
        if self._tokenizer is None:
            return None
        return Tokens(self._by_role.total(), dict(self._by_role), self._trained, _lengths(self._lengths))


def _lengths(lengths: "array[int]") -> Lengths | None:
    if not lengths:
        return None
    ordered = sorted(lengths)
    at = {share: ordered[math.ceil(share * len(ordered)) - 1] for share in (0.5, 0.95)}
    return Lengths(ordered[0], at[0.5], at[0.95], ordered[-1])


def _pieces(row: Example | Preference) -> Iterator[_Piece]:
    for tool in row.tools:
        yield _Piece("tools", _json(tool), trained=False, alternative=0)
    if isinstance(row, Preference):
        for message in row.messages:
            yield from _pieces_of(message, trained=False, alternative=0)
        yield from _pieces_of(row.preferred, trained=True, alternative=1)
        yield from _pieces_of(row.non_preferred, trained=True, alternative=2)
        return
    weights = iter(row.weights)
    for message in row.messages:
        yield from _pieces_of(message, trained=message["role"] == "assistant" and next(weights) == 1, alternative=0)


def _pieces_of(message: Message, *, trained: bool, alternative: int) -> Iterator[_Piece]:
    for text in _texts(message):
        yield _Piece(message["role"], text, trained, alternative)


def _messages(row: Example | Preference) -> Iterator[Message]:
    yield from row.messages
    if isinstance(row, Preference):
        yield row.preferred
        yield row.non_preferred


def _texts(message: Message) -> Iterator[str]:
    """What a template writes of a message, apart from its own marks."""
    if message["content"]:
        yield message["content"]
    for call in message.get("tool_calls", ()):
        yield call["function"]["name"]
        yield _json(call["function"]["arguments"])


def _parts(row: Example | Preference) -> list[object]:
    """All of a row that training can tell from another's."""
    if isinstance(row, Preference):
        return [row.tools, row.messages, row.preferred, row.non_preferred]
    return [row.tools, row.messages, row.weights]


def _prompt(row: Example | Preference) -> list[object]:
    """What is asked: everything before the last answer."""
    return [row.tools, row.messages if isinstance(row, Preference) else row.messages[:-1]]


def _digest(parts: list[object]) -> bytes:
    return hashlib.blake2b(_json(parts).encode(), digest_size=8).digest()


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
