"""Training files in, token rows out, with labels on what the model is to write.

Every fault of a file is found in one reading, with its line; what a line may hold, `rows` says. Nothing here knows
how training uses the rows.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from training.rows import (
    MAX_FAULTS,
    Example,
    Fault,
    Message,
    Method,
    Preference,
    RowInvalid,
    Tool,
    numbered_lines,
    parse_line,
)

IGNORED = -100  # the label that torch's cross entropy leaves out
CHUNK_BYTES = 1 << 16


class DatasetInvalid(Exception):
    """The data cannot be trained on; `faults` holds every fault found, at most `MAX_FAULTS`."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        more = " (only the first are listed)" if len(faults) >= MAX_FAULTS else ""
        super().__init__("\n".join([f"{len(faults)} faults in the data{more}:", *map(str, faults)]))
        self.faults = list(faults)


class NoGenerationMask(Exception):
    """The base's chat template does not mark what the assistant writes, so nothing says what to train on."""


class TemplateLacks(Exception):
    """The base's chat template would leave out, without a word, what the messages hold."""


@dataclass(frozen=True, slots=True)
class Row:
    """One tokenised conversation: `labels[i]` is `input_ids[i]` where the model is to write it, else `IGNORED`."""

    input_ids: list[int]
    labels: list[int]

    @property
    def trained_tokens(self) -> int:
        return len(self.labels) - self.labels.count(IGNORED)


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt with its better and its worse answer; only the answers have labels."""

    chosen: Row
    rejected: Row


def load(path: Path, tokenizer: PreTrainedTokenizerFast, *, max_length: int) -> list[Row]:
    """Read and tokenise a whole supervised file.

    Raises:
        DatasetInvalid: with every faulty line, rows longer than `max_length` tokens among them.
        NoGenerationMask: the fault is the base's, not the data's.
    """

    def row(example: Example | Preference) -> Row:
        assert isinstance(example, Example)
        return _bounded(tokenizer, example, max_length)

    return _load(path, "supervised", row)


def load_pairs(path: Path, tokenizer: PreTrainedTokenizerFast, *, max_length: int) -> list[Pair]:
    """Read and tokenise a whole preference file; `max_length` bounds the prompt with either answer.

    Raises:
        DatasetInvalid, NoGenerationMask: as `load`.
    """

    def pair(preference: Example | Preference) -> Pair:
        assert isinstance(preference, Preference)
        return Pair(*(_bounded(tokenizer, side, max_length) for side in (preference.chosen, preference.rejected)))

    return _load(path, "dpo", pair)


Made = TypeVar("Made")


def _load(path: Path, method: Method, make: Callable[[Example | Preference], Made]) -> list[Made]:
    made: list[Made] = []
    faults: list[Fault] = []
    with path.open("rb") as file:
        for number, line in numbered_lines(iter(lambda: file.read(CHUNK_BYTES), b"")):
            if not line.strip():
                continue
            try:
                made.append(make(parse_line(number, line, method)))
            except (RowInvalid, TemplateLacks) as error:
                faults.append(Fault(number, str(error)))
            except TemplateError as error:
                faults.append(Fault(number, f"the base's chat template refuses these messages: {error}"))
            if len(faults) == MAX_FAULTS:
                break
    if not made and not faults:
        faults.append(Fault(1, "the file holds no examples"))
    if faults:
        raise DatasetInvalid(faults)
    return made


def _bounded(tokenizer: PreTrainedTokenizerFast, example: Example, max_length: int) -> Row:
    row = tokenize(tokenizer, example.messages, example.weights, example.tools)
    if len(row.input_ids) > max_length:
        raise RowInvalid(f"{len(row.input_ids)} tokens, but max_length is {max_length}: shorten or split it")
    return row


def tokenize(
    tokenizer: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    weights: Sequence[int] | None = None,
    tools: Sequence[Tool] = (),
) -> Row:
    """Render `messages` by the tokenizer's chat template; label the assistant turns of weight 1, end-of-turn included.

    Raises:
        NoGenerationMask: the template has no generation block for each assistant message.
        TemplateError: the template refuses the messages.
        TemplateLacks: the template knows no tools, and there are some.
    """
    text, spans = _render(tokenizer, messages, tools)
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


def _render(
    tokenizer: PreTrainedTokenizerFast, messages: Sequence[Message], tools: Sequence[Tool]
) -> tuple[str, list[tuple[int, int]]]:
    """The chat as text, and the character range of each generation block in it."""
    template = tokenizer.get_chat_template()
    if not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise NoGenerationMask(
            "the base's chat template has no {% generation %} block around the assistant's content: "
            "add one to its chat_template, or choose a base that has it"
        )
    for word, used in (("tools", bool(tools)), ("tool_calls", any("tool_calls" in message for message in messages))):
        if used and not re.search(rf"\b{word}\b", template):
            raise TemplateLacks(f"the base's chat template does not write '{word}', so they cannot be trained on")
    texts, spans = render_jinja_template(
        [list(messages)],
        tools=list(tools) or None,
        chat_template=template,
        return_assistant_tokens_mask=True,
        **tokenizer.special_tokens_map,
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
