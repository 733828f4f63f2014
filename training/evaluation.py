"""What a model answers, with Hugging Face's greedy decoding as reference; and an adapter beside its base and its
predecessor, on the engine that trains."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from training import adapter_weights, metrics, scoring
from training.dataset import IGNORED, Pair, Row
from training.engine import Engine, Run, Spec, Telling
from training.hyperparameters import Hyperparameters
from training.metrics import Regression
from training.progress import no_library_bars
from training.scoring import Scored
from training.tasks import Message

MOST_TOLD = 2_000
"""Examples whose loss is computed."""
MOST_ANSWERED = 200
"""Examples that are answered, evenly from all: each token of an answer is a pass over its row."""
MOST_TOKENS = 256
"""Of an answer."""
SPARE_TOKENS = 8
"""Beside the longest right answer: what goes on longer is wrong."""


@dataclass(frozen=True, slots=True)
class Generation:
    """A greedy answer: its tokens, end-of-turn included, and the natural logarithm of each one's probability."""

    text: str
    token_ids: list[int]
    tokens: list[str]
    logprobs: list[float]


class Answerer:
    """Greedy answers of a base, or of a base with one PEFT adapter, in float32 on the CPU, one chat at a time."""

    def __init__(self, base: Path, adapter: Path | None = None, *, max_new_tokens: int = 64) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        with no_library_bars():
            model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if adapter is not None:
            from peft import PeftModel  # takes a second to import, and only this needs it

            model = PeftModel.from_pretrained(model, adapter)
        self._model = model
        self._model.eval()
        self._max_new_tokens = max_new_tokens

    def __call__(self, messages: list[Message]) -> str:
        return self.generate(messages).text

    def generate(self, messages: list[Message]) -> Generation:
        """Continue the chat with the likeliest token each time, up to the end of turn or `max_new_tokens`."""
        prompt = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            output = self._model.generate(
                **prompt,
                do_sample=False,
                max_new_tokens=self._max_new_tokens,
                output_logits=True,
                return_dict_in_generate=True,
            )
        token_ids = output.sequences[0, prompt["input_ids"].shape[1] :].tolist()
        logprobs = [
            torch.log_softmax(logits[0], dim=-1)[token].item()
            for logits, token in zip(output.logits, token_ids, strict=True)
        ]
        tokens = [self.tokenizer.decode([token]) for token in token_ids]
        return Generation(self.tokenizer.decode(token_ids, skip_special_tokens=True), token_ids, tokens, logprobs)


@dataclass(frozen=True, slots=True)
class Judgement:
    """Of one model: `loss` is the mean per token in nats, `scored` of those that it answered."""

    loss: float
    perplexity: float
    token_accuracy: float
    scored: Scored


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """An adapter beside its base, and beside what it is to take the place of.

    `loss_regression` and `answer_regression` say whether it is worse than that by more than chance explains.
    """

    examples: int
    base: Judgement
    adapter: Judgement
    previous: Judgement | None = None
    loss_regression: Regression | None = None
    answer_regression: Regression | None = None

    @property
    def is_regression(self) -> bool:
        return any(
            found is not None and found.is_regression for found in (self.loss_regression, self.answer_regression)
        )

    def as_json(self) -> dict[str, Any]:
        """With null for what JSON has no number for."""
        found: dict[str, Any] = scoring.finite(
            {
                "examples": self.examples,
                "kind": self.adapter.scored.kind,
                "is_regression": self.is_regression,
                "base": asdict(self.base),
                "adapter": asdict(self.adapter),
                "previous": None if self.previous is None else asdict(self.previous),
                "loss_regression": scoring.regression_json(self.loss_regression),
                "answer_regression": scoring.regression_json(self.answer_regression),
            }
        )
        return found

    def metrics(self) -> dict[str, float | None]:
        """The figures that a job's metrics have, by name."""
        name, figure = self.adapter.scored.headline
        return {
            "eval_loss": self.adapter.loss,
            "eval_base_loss": self.base.loss,
            "eval_exact_match": self.adapter.scored.exact_match,
            "eval_base_exact_match": self.base.scored.exact_match,
            f"eval_{name.replace(' ', '_').lower()}": figure,
            "eval_regression": float(self.is_regression),
        }

    def summary(self) -> str:
        """One line for a job's events."""
        name, figure = self.adapter.scored.headline
        told = (
            f"On {self.examples} validation examples: {name} {figure:.3f} (base {self.base.scored.headline[1]:.3f}), "
            f"loss {self.adapter.loss:.3f} (base {self.base.loss:.3f})"
        )
        if self.previous is None:
            return told
        told += f"; the version now served: {self.previous.scored.headline[1]:.3f}, loss {self.previous.loss:.3f}"
        return f"{told}: worse than that" if self.is_regression else told


def evaluate_adapter(
    engine: Engine,
    tokenizer: PreTrainedTokenizerFast,
    adapter: Run | Path,
    examples: Sequence[Row] | Sequence[Pair],
    *,
    previous: Path | None = None,
) -> EvaluationReport:
    """Loss and greedy answers of the base, the adapter and `previous`; of pairs the better answer counts.

    Nothing is loaded but the adapters: all three are the engine's own model.

    Raises:
        ValueError: nothing in the examples is to be told.
        TrainingFailed: an adapter does not fit the base.
    """
    questions = Questions(engine, tokenizer, examples)
    rows = questions.rows
    run = as_run(engine, adapter, rows[0]) if isinstance(adapter, Path) else adapter
    untouched = engine.begin(Spec("supervised", run.spec.hyperparameters, rows[:1]))  # lora_B is zero: the base
    base, (found, tellings, answers) = questions.of(untouched)[0], questions.of(run)
    if previous is None:
        return EvaluationReport(len(rows), base, found)
    before, old_tellings, old_answers = questions.of(as_run(engine, previous, rows[0]))
    losses = None
    if len(rows) > 1:
        losses = metrics.regression_of_losses([one.loss for one in old_tellings], [one.loss for one in tellings])
    return EvaluationReport(
        len(rows), base, found, before, losses, scoring.compared(questions.expected, old_answers, answers)
    )


def as_run(engine: Engine, folder: Path, row: Row) -> Run:
    """The adapter in `folder`, as the engine serves it. Raises TrainingFailed."""
    with safe_open(folder / adapter_weights.WEIGHTS, "pt") as tensors:
        names = list(tensors.keys())
        rank = max(tensors.get_slice(name).get_shape()[0] for name in names if name.endswith("lora_A.weight"))
    modules = tuple(sorted({name.split(".")[-3] for name in names}))
    hp = Hyperparameters(rank=rank, lora_alpha=rank, target_modules=modules, max_length=max(2, len(row.input_ids)))
    return engine.begin(Spec("supervised", hp, [row], warm_start=folder))


class Questions:
    """The same for each model: its loss is of all rows, its answers of some."""

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerFast, examples: Sequence[Row] | Sequence[Pair]
    ) -> None:
        """Raises ValueError: nothing in the examples is to be told."""
        rows = [found for found in map(_answer_row, examples) if found is not None][:MOST_TOLD]
        if not rows:
            raise ValueError("nothing in these examples is to be told")
        self._engine = engine
        self._tokenizer = tokenizer
        self.rows = rows
        self._asked = rows[:: -(-len(rows) // MOST_ANSWERED)]
        answers = [[token for token in row.labels if token != IGNORED] for row in self._asked]
        self._prompts = [row.input_ids[: _first(row)] for row in self._asked]
        self._most_tokens = min(MOST_TOKENS, max(map(len, answers)) + SPARE_TOKENS)
        special = set(tokenizer.all_special_ids)
        self._ends = {tokenizer.eos_token_id} | {answer[-1] for answer in answers if answer[-1] in special}
        self.expected = [self._text(answer) for answer in answers]
        self._kind = scoring.kind_of(self.expected)

    def of(self, run: Run) -> tuple[Judgement, list[Telling], list[str]]:
        tellings = self._engine.tell(run, self.rows)
        answers = self.answers(run)
        hits = [hit for one in tellings for hit in one.hits]
        loss = sum(one.loss * len(one.hits) for one in tellings) / len(hits)
        scored = scoring.scored(self.expected, answers, self._kind)
        return Judgement(loss, metrics.perplexity(loss, 1), sum(hits) / len(hits), scored), tellings, answers

    def scored(self, run: Run) -> Scored:
        return scoring.scored(self.expected, self.answers(run), self._kind)

    def answers(self, run: Run) -> list[str]:
        found = self._engine.answer(run, self._prompts, ends=self._ends, most_tokens=self._most_tokens)
        return [self._text(tokens) for tokens in found]

    def _text(self, tokens: Sequence[int]) -> str:
        text = self._tokenizer.decode(list(tokens), skip_special_tokens=True)
        assert isinstance(text, str)
        return text.strip()


def _answer_row(example: Row | Pair) -> Row | None:
    """The row with its last learned turn alone to be told; None where none is."""
    row = example.chosen if isinstance(example, Pair) else example
    labels = list(row.labels)
    while labels and labels[-1] == IGNORED:
        labels.pop()
    if not labels or labels[0] != IGNORED:
        return None
    start = len(labels)
    while start and labels[start - 1] != IGNORED:
        start -= 1
    stop = len(labels)
    return Row(row.input_ids[:stop], [IGNORED] * start + labels[start:stop])


def _first(row: Row) -> int:
    return next(at for at, label in enumerate(row.labels) if label != IGNORED)
