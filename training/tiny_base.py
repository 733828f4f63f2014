"""A Llama of about one million parameters, made here from a seed, so that everything runs without a download.

It answers the tasks of `tiny_text` and leaves room for adapters; it is a base for tests and demos, not a product.
Read `build` first; the rest is in the order in which it is called.
"""

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from training import dataset, tiny_text
from training.dataset import IGNORED, Row
from training.determinism import reproducible
from training.output_folder import new_folder
from training.progress import OnProgress, Progress, no_library_bars
from training.tiny_template import CHAT_TEMPLATE
from training.tiny_text import MIXTURE, Conversation

PAD, BOS, END = "<|pad|>", "<|bos|>", "<|end|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL_TOKENS = [PAD, BOS, END, *ROLES.values()]

# What it learns from, as tokens and labels: the first rows of each stream. A test holds it, so that whoever changes
# the template or the labels learns here that other rows make another base.
ROWS_SHA256 = "1db50efc32bb14ef9fc2a60e644352c633513c83a177875df46a9b8bab4d002e"

# The order of partial sums, and so every bit of the result, follows the number of threads.
THREADS = 1


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything but the seed that decides the weights."""

    hidden_size: int = 128
    intermediate_size: int = 256
    layers: int = 3
    heads: int = 4
    vocabulary: int = 1024
    max_position_embeddings: int = 512
    steps: int = 2400
    repeat_only_steps: int = 300
    batch_size: int = 24
    initializer_range: float = 0.06
    learning_rate: float = 4e-3
    warmup_steps: int = 50
    weight_decay: float = 0.1
    heldout_per_task: int = 50


DEFAULT = Recipe()


@dataclass(frozen=True, slots=True)
class TinyBase:
    """A finished base: `path` is an ordinary Hugging Face model folder."""

    path: Path
    parameters: int
    heldout_accuracy: float
    heldout_accuracy_by_task: dict[str, float]


def recipe_hash(*, seed: int = 0, recipe: Recipe = DEFAULT) -> str:
    """Hash of all that decides the weights of `build`, to cache them by: numbers, text, code, libraries.

    The chat template counts as far as it changes `ROWS_SHA256`; see `give_template`.
    """
    parts = {
        "recipe": asdict(recipe),
        "seed": seed,
        "code": [Path(source).read_text(encoding="utf-8") for source in (__file__, tiny_text.__file__)],
        "libraries": {name: version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")},
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def build(out: Path, *, seed: int = 0, recipe: Recipe = DEFAULT, on_progress: OnProgress | None = None) -> TinyBase:
    """Train the tiny base and write it to the new folder `out`; the same bytes each time on one machine.

    Raises:
        OutputExists: `out` is taken.
    """
    with new_folder(out) as folder, reproducible(seed, threads=THREADS):
        tokenizer = make_tokenizer(seed, recipe)
        model = LlamaForCausalLM(_config(tokenizer, recipe))
        _train(model, tokenizer, seed, recipe, on_progress)
        accuracy = heldout_accuracy(model, tokenizer, recipe.heldout_per_task)
        base = TinyBase(out, model.num_parameters(), sum(accuracy.values()) / len(accuracy), accuracy)
        with no_library_bars():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _write_card(folder, base, seed, recipe)
    return base


def give_template(folder: Path) -> None:
    """Bring the chat template of a base built earlier up to date; its weights are the same with either."""
    path = folder / "chat_template.jinja"
    if path.read_text(encoding="utf-8") != CHAT_TEMPLATE:
        new = path.with_suffix(f".{os.getpid()}")
        new.write_text(CHAT_TEMPLATE, encoding="utf-8")
        new.replace(path)


def make_tokenizer(seed: int, recipe: Recipe) -> PreTrainedTokenizerFast:
    """Byte-level BPE learned from the task text; any UTF-8 input has tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    rng = random.Random(f"tokenizer {seed}")
    # without the invented words, which would become one token each
    sample = tiny_text.conversations(
        rng, heldout=False, tasks=[task for task in tiny_text.TASKS if "invented" not in task]
    )
    bpe.train_from_iterator(
        (message["content"] for conversation in islice(sample, 20_000) for message in conversation.messages),
        trainers.BpeTrainer(
            vocab_size=recipe.vocabulary,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    # plain text (not chat) also starts with the token that every training row started with
    bpe.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bpe.token_to_id(BOS))])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=END,
        pad_token=PAD,
        extra_special_tokens=list(ROLES.values()),
        chat_template=CHAT_TEMPLATE,
        model_max_length=recipe.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def _config(tokenizer: PreTrainedTokenizerFast, recipe: Recipe) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=recipe.vocabulary,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.max_position_embeddings,
        initializer_range=recipe.initializer_range,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def _train(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    recipe: Recipe,
    on_progress: OnProgress | None,
) -> None:
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, recipe))
    for step, rows in enumerate(islice(_batches(tokenizer, seed, recipe), recipe.steps), start=1):
        logits, labels, _ = _answer_logits(model, rows)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if on_progress is not None:
            on_progress(Progress(step, recipe.steps, loss.item()))


def rows_sha256(*, seed: int = 0, recipe: Recipe = DEFAULT, batches: int = 40) -> str:
    """Digest of the first `batches` batches of repetition and of everything."""
    tokenizer = make_tokenizer(seed, recipe)
    streams = (_stream(tokenizer, random.Random(seed), recipe.batch_size, tasks) for tasks in (["repeat"], MIXTURE))
    rows = [[(row.input_ids, row.labels) for batch in islice(stream, batches) for row in batch] for stream in streams]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear up over the warmup, then linear down to zero."""
    warm = (step + 1) / recipe.warmup_steps
    left = (recipe.steps - step) / (recipe.steps - recipe.warmup_steps)
    return min(warm, left)


def _batches(tokenizer: PreTrainedTokenizerFast, seed: int, recipe: Recipe) -> Iterator[list[Row]]:
    """Fresh text for every step, pure repetition at first.

    Copying from the prompt is what all list tasks need and what a model this small is slowest to find; every
    token of a repetition teaches it, where the one-word answers of the other tasks drown it.
    """
    rng = random.Random(seed)
    repetition = _stream(tokenizer, rng, recipe.batch_size, ["repeat"])
    everything = _stream(tokenizer, rng, recipe.batch_size, MIXTURE)
    yield from islice(repetition, recipe.repeat_only_steps)
    yield from everything


def _stream(
    tokenizer: PreTrainedTokenizerFast, rng: random.Random, batch_size: int, tasks: Sequence[str]
) -> Iterator[list[Row]]:
    """Endless batches; rows of similar length share one, which saves most of the padding."""
    endless = tiny_text.conversations(rng, heldout=False, tasks=tasks)
    while True:
        drawn = islice(endless, 8 * batch_size)
        rows = [dataset.tokenize(tokenizer, conversation.messages) for conversation in drawn]
        rows.sort(key=lambda row: len(row.input_ids))
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        rng.shuffle(batches)
        yield from batches


def _answer_logits(model: LlamaForCausalLM, rows: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (tokens, vocabulary) for the answers' tokens only, with each token's label and row (tokens,)."""
    input_ids, labels = dataset.as_tensors(rows)
    hidden = model.model(input_ids).last_hidden_state[:, :-1]  # (batch, seq - 1, hidden)
    labels = labels[:, 1:]  # the token after each position
    answered = labels != IGNORED
    return model.lm_head(hidden[answered]), labels[answered], answered.nonzero()[:, 0]


def heldout_accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, per_task: int) -> dict[str, float]:
    """Share of held-out questions answered word for word by greedy decoding, per task.

    One pass over the right answer decides it: greedy decoding gives exactly that answer if and only if
    every one of its tokens is the most likely one after those before it.
    """
    accuracy = {}
    for task, asked in _heldout_questions(per_task).items():
        rows = [dataset.tokenize(tokenizer, conversation.messages) for conversation in asked]
        with torch.inference_mode():
            logits, labels, row_of_token = _answer_logits(model, rows)
        wrong = row_of_token[logits.argmax(-1) != labels].unique()
        accuracy[task] = 1 - len(wrong) / len(rows)
    return accuracy


def _heldout_questions(per_task: int) -> dict[str, list[Conversation]]:
    rng = random.Random("held out")
    drawn = islice(tiny_text.conversations(rng, heldout=True, tasks=list(tiny_text.TASKS)), 40 * per_task)
    questions: dict[str, list[Conversation]] = {task: [] for task in tiny_text.TASKS}
    for conversation in drawn:
        if len(questions[conversation.task]) < per_task:
            questions[conversation.task].append(conversation)
    return questions


def _write_card(folder: Path, base: TinyBase, seed: int, recipe: Recipe) -> None:
    card = {
        "recipe_hash": recipe_hash(seed=seed, recipe=recipe),
        "seed": seed,
        "parameters": base.parameters,
        "heldout_accuracy": base.heldout_accuracy,
        "heldout_accuracy_by_task": base.heldout_accuracy_by_task,
    }
    (folder / "tailor.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
