"""Supervised chat data: OpenAI's JSONL in, token rows out, with labels on what the model is to write.

Every fault of a file is found in one reading, with its line. Nothing here knows how training uses the rows.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

IGNORED = -100  # the label that torch's cross entropy leaves out
MAX_FAULTS = 50
MAX_LINE_BYTES = 1 << 20
ROLES = ("system", "user", "assistant")

Message = dict[str, str]


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one line of a data file; lines count from 1."""

    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


class DatasetInvalid(Exception):
    """The data cannot be trained on; `faults` holds every fault found, at most `MAX_FAULTS`."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        more = " (only the first are listed)" if len(faults) >= MAX_FAULTS else ""
        super().__init__("\n".join([f"{len(faults)} faults in the data{more}:", *map(str, faults)]))
        self.faults = list(faults)


class NoGenerationMask(Exception):
    """The base's chat template does not mark what the assistant writes, so nothing says what to train on."""


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation of a data file; `weights` has one entry, 0 or 1, per assistant message."""

    line: int
    messages: list[Message]
    weights: list[int]


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenised conversation: `labels[i]` is `input_ids[i]` where the model is to write it, else `IGNORED`."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained_tokens(self) -> int:
        return len(self.labels) - self.labels.count(IGNORED)


def load(path: Path, tokenizer: PreTrainedTokenizerFast, *, max_length: int) -> list[Row]:
    """Read and tokenise a whole data file.

    Raises:
        DatasetInvalid: with every faulty line, rows longer than `max_length` tokens among them.
        NoGenerationMask: the fault is the base's, not the data's.
    """
    examples, faults = parse(path)
    rows: list[Row] = []
    for example in examples:
        try:
            row = tokenize(tokenizer, example.messages, example.weights)
        except TemplateError as error:
            faults.append(Fault(example.line, f"the base's chat template refuses these messages: {error}"))
            continue
        if len(row.input_ids) > max_length:
            reason = f"{len(row.input_ids)} tokens, but max_length is {max_length}: shorten or split it"
            faults.append(Fault(example.line, reason))
        rows.append(row)
    if not examples and not faults:
        faults.append(Fault(1, "the file holds no examples"))
    if faults:
        raise DatasetInvalid(sorted(faults, key=lambda fault: fault.line)[:MAX_FAULTS])
    return rows


def tokenize(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], weights: Sequence[int] | None = None
) -> Row:
    """Render `messages` by the tokenizer's chat template; label the assistant turns of weight 1, end-of-turn included.

    Raises:
        NoGenerationMask: the template has no generation block for each assistant message.
        TemplateError: the template refuses the messages.
    """
    text, spans = _render(tokenizer, messages)
    if weights is None:
        weights = [1] * len(spans)
    if len(weights) != len(spans):
        raise NoGenerationMask(
            f"the chat template marked {len(spans)} generated turns for {len(weights)} assistant messages"
        )
    trained = [span for span, weight in zip(spans, weights, strict=True) if weight]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [
        token if any(start < span_end and end > span_start for span_start, span_end in trained) else IGNORED
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
    return Row(encoded["input_ids"], labels)


def _render(tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
    """The chat as text, and the character range of each generation block in it."""
    template = tokenizer.get_chat_template()
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise NoGenerationMask(
            "the base's chat template has no {% generation %} block around the assistant's content: "
            "add one to its chat_template, or choose a base that has it"
        )
    texts, spans = render_jinja_template(
        [list(messages)], chat_template=template, return_assistant_tokens_mask=True, **tokenizer.special_tokens_map
    )
    return texts[0], spans[0]


def as_tensors(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """`input_ids` and `labels`, both (rows, longest), padded on the right.

    Attention looks left, so no token ever sees the padding and no mask is needed.
    """
    longest = max(len(row.input_ids) for row in rows)
    input_ids = [row.input_ids + [0] * (longest - len(row.input_ids)) for row in rows]
    labels = [row.labels + [IGNORED] * (longest - len(row.labels)) for row in rows]
    return torch.tensor(input_ids), torch.tensor(labels)


def parse(path: Path) -> tuple[list[Example], list[Fault]]:
    """Every well-formed example of a file, and a fault for every line that is none, up to `MAX_FAULTS`."""
    examples: list[Example] = []
    faults: list[Fault] = []
    for number, line in _lines(path):
        try:
            examples.append(_example(number, line))
        except _Faulty as fault:
            faults.append(Fault(number, str(fault)))
            if len(faults) == MAX_FAULTS:
                break
    return examples, faults


class _Faulty(Exception):
    """Ends the reading of one line; its text is the reason."""


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines that are not blank; of an over-long one only its first `MAX_LINE_BYTES` + 1 bytes."""
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            rest = line
            while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(MAX_LINE_BYTES + 1)
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield number, line


def _example(number: int, line: bytes) -> Example:
    row = _json_object(line)
    if unknown := row.keys() - {"messages"}:
        raise _Faulty(f"unknown field {_listed(unknown)}: a row has the one field 'messages'")
    messages = row.get("messages")
    if not isinstance(messages, list) or not messages:
        raise _Faulty("'messages' must be a list of at least one message")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    if messages[-1]["role"] != "assistant":
        raise _Faulty("the last message must be the assistant's")
    weights = [message.get("weight", 1) for message in messages if message["role"] == "assistant"]
    if not any(weights):
        raise _Faulty("every assistant message has weight 0, so there is nothing to learn")
    return Example(number, [{"role": m["role"], "content": m["content"]} for m in messages], weights)


def _json_object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise _Faulty(f"longer than {MAX_LINE_BYTES} bytes")
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _Faulty(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise _Faulty(f"not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a nesting of thousands
        raise _Faulty(f"not JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        raise _Faulty("not a JSON object")
    return row


def _check_message(message: object, where: str) -> None:
    if not isinstance(message, dict):
        raise _Faulty(f"{where} is not an object")
    role = message.get("role")
    if role not in ROLES:
        raise _Faulty(f"{where}.role is {role!r}, not one of {', '.join(ROLES)}")
    allowed = {"role", "content", "weight"} if role == "assistant" else {"role", "content"}
    if unknown := message.keys() - allowed:
        raise _Faulty(f"{where} has the unknown field {_listed(unknown)}")
    content = message.get("content")
    if not isinstance(content, str) or not content:
        raise _Faulty(f"{where}.content must be a text of at least one character")
    if not _encodable(content):
        raise _Faulty(f"{where}.content holds half of a surrogate pair, which is not valid Unicode")
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise _Faulty(f"{where}.weight is {weight!r}, not 0 or 1")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _listed(names: set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names))
