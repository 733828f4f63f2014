"""Trains many adapters of one base at once: one forward and one backward pass a step, whoever takes part.

Read `Engine.step` first. A run's bits do not depend on who steps beside it: what is summed over tokens is summed in the
run's own shape, and a matrix product gives each row the same bits whatever rows lie around it (docs/training.md says
where that holds).
"""

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, PreTrainedModel

from training import adapter_weights, checkpoints, dpo, schedule
from training.dataset import IGNORED, Pair, Row
from training.determinism import deterministic
from training.failures import LossNotFinite, OutOfMemory, TrainingFailed
from training.layout import Block, Item, Line, block, item, levelled, line
from training.progress import no_library_bars
from training.quantization import Quantization, packer
from training.run import Best, Run, Spec, halves, side_by_side
from training.slots import Part, adaptable
from training.token_loss import LEAST_ROWS, token_losses

__all__ = ["Engine", "Evaluation", "Run", "Spec", "StepReport", "Telling"]

READ_TOKENS = 8_192  # in one pass, where nothing is learned
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8  # AdamW's, as everywhere


@dataclass(frozen=True, slots=True)
class Evaluation:
    """`loss` is the mean per token in nats (dpo: per pair), `token_accuracy` the share of tokens whose target was the
    likeliest (dpo: of pairs whose better answer gained more than the worse)."""

    loss: float
    token_accuracy: float
    tokens: int


@dataclass(frozen=True, slots=True)
class Telling:
    """Of one row: the mean loss of its trained tokens in nats, and which of them were the likeliest."""

    loss: float
    hits: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class StepReport:
    """Of one run's step; `loss` and `token_accuracy` as in `Evaluation`. With `error` the run is over, its weights as
    they were before the step."""

    step: int
    loss: float
    token_accuracy: float
    tokens: int
    learning_rate: float
    grad_norm: float
    validation: Evaluation | None = None
    error: TrainingFailed | None = None


@dataclass(frozen=True, slots=True)
class _Share:
    """What one run has in one pass. `weights` are those that it is computed with (None: the base), `units` the tokens
    or pairs of the run's whole step: the step is one mean over them, however it is cut into passes."""

    run: Run
    weights: Tensor | None
    block: Block
    units: int
    better_tokens: int = 0  # dpo: trained ones of the better answers, of the whole step

    @property
    def dpo(self) -> bool:
        return self.run.spec.method == "dpo"


@dataclass(slots=True)
class _Step:
    """One run's step, pass by pass. `sums` are loss and hits, on the device, since reading them would wait for it."""

    run: Run
    passes: list[list[Item]]
    tokens: int = field(init=False)
    units: int = field(init=False)
    better_tokens: int = field(init=False, default=0)
    gradient: Tensor | None = None
    sums: Tensor | None = None

    def __post_init__(self) -> None:
        self.tokens = sum(item.trained_tokens for items in self.passes for item in items)
        self.units = max(1, self.tokens)
        if self.run.spec.method == "dpo":
            self.units = sum(map(len, self.passes)) // 2
            self.better_tokens = sum(_better_tokens(items) for items in self.passes)

    def share(self, turn: int) -> _Share:
        """What the step has in its pass of this number."""
        return _Share(self.run, self.run.weights, block(self.passes[turn]), self.units, self.better_tokens)

    def add(self, sums: Tensor, gradient: Tensor) -> None:
        self.sums = sums if self.sums is None else self.sums + sums
        self.gradient = gradient if self.gradient is None else self.gradient.add_(gradient)


class _Group:
    """Adapters of one shape, stacked (slots, size), in the base's precision; their gradients come layer by layer."""

    def __init__(self, shares: Sequence[_Share], weights: Sequence[Tensor], dtype: torch.dtype) -> None:
        self._layout = shares[0].run.layout
        self._stack = torch.stack(list(weights)).to(dtype)
        self._gradients: list[Tensor | None] = [None] * len(self._layout.sizes)

    def parts(self, start: int, stop: int) -> Iterator[tuple[str, Part]]:
        """Each layer's path with the adapters it is to serve on these tokens."""
        places = self._layout.places
        rows = (stop - start) // len(self._stack)
        for number, (place, a, b) in enumerate(zip(places, *self._layout.halves(self._stack), strict=True)):
            yield place.module, Part(start, rows, a, b, self._gradients, (number, len(places) + number))

    def flat_gradients(self) -> Tensor:
        """(slots, size); zero where nothing came."""
        slots = len(self._stack)
        found = [
            self._stack.new_zeros(slots, size) if gradient is None else gradient.view(slots, size)
            for gradient, size in zip(self._gradients, self._layout.sizes, strict=True)
        ]
        return torch.cat(found, dim=1).float()


class Engine:
    """One base, frozen and warm."""

    def __init__(
        self,
        base: Path,
        *,
        device: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
        level: bool | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        """Load the model in the folder `base`: on the GPU in its own precision if there is one, else in float32.

        `threads` are the CPU's, torch's own choice if not given; their number decides the bits. `level`: runs of like
        shape are padded to one length where they step together, so that one kernel takes them all. It is what a GPU
        is quick at, and its default there; on a CPU it would cost time, and a run's last bits would follow its company.
        With `quantization` the linear layers are kept in four bits, and never whole on a GPU.

        Raises:
            TrainingFailed: the base's output layer does more than multiply, or bitsandbytes is needed and absent.
        """
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.quantization = quantization
        pack = None if quantization is None else packer(self.device)
        self.threads = threads or torch.get_num_threads()
        self.level = self.device.type == "cuda" if level is None else level
        precision = dtype or ("auto" if self.device.type == "cuda" else "float32")
        with no_library_bars():
            model = AutoModelForCausalLM.from_pretrained(base, dtype=precision)
        _check_output(model)
        self._layers = adaptable(model if pack else model.to(self.device), pack)
        self._model: PreTrainedModel = model.to(self.device).eval()
        self._head: Tensor = self._model.get_output_embeddings().weight
        self.longest: int = self._model.config.max_position_embeddings
        self._base = base.resolve().name

    def begin(self, spec: Spec) -> Run:
        """A run before its first step.

        Raises:
            TrainingFailed: the base has no such layers, a row is too long, or the adapter to start from does not fit.
            ValueError: the run wants its base quantised otherwise.
        """
        hp = spec.hyperparameters
        if hp.quantization != self.quantization:
            raise ValueError(f"the run wants quantization {hp.quantization}, and the base has {self.quantization}")
        linears = {path: (layer.fan_in, layer.fan_out) for path, layer in self._layers.items()}
        layout = adapter_weights.plan(linears, hp)
        if spec.warm_start is None:
            weights = adapter_weights.fresh(layout, hp.seed)
        else:
            weights = adapter_weights.warm(layout, hp.seed, spec.warm_start)
        run = Run(spec, layout, weights.to(self.device), longest=self.longest, base=self._base)
        if spec.method == "dpo" and spec.warm_start is not None:
            run.reference = run.weights.clone()
        return run

    def resume(self, spec: Spec, folder: Path) -> Run:
        """The run as its newest whole checkpoint in `folder` has it, or before its first step if there is none.

        Raises:
            TrainingFailed: as `begin` does, or the checkpoint is another run's.
        """
        run = self.begin(spec)
        checkpoint = checkpoints.newest(folder)
        if checkpoint is not None:
            run.restore(checkpoint)
        return run

    def cost(self, run: Run) -> int:
        """Tokens, padding included, of the widest pass of the run's next step; 0 where it is done."""
        return 0 if run.done else max(block(items).tokens for items in run.micro_batches())

    def step(self, runs: Sequence[Run]) -> list[StepReport]:
        """One optimiser step of each run, all in one batch. A run that fails is told so and is over; the rest go on.

        Raises:
            ValueError: a run is done, or stands there twice.
        """
        if any(run.done for run in runs) or len(set(map(id, runs))) < len(runs):
            raise ValueError("each run of a step must have steps left, and stand there once")
        with self._prepared(runs):
            return self._applied(self._differentiated(runs))

    def evaluate(self, run: Run, rows: Sequence[Row] | Sequence[Pair]) -> Evaluation:
        """How well the run tells `rows`, pairs where it learns from pairs, as it is now; changes nothing.

        Raises:
            ValueError: nothing in them is to be told.
        """
        pairs = [halves(row) for row in rows]
        width = run.spec.hyperparameters.batch_size
        passes = [side_by_side(pairs[at : at + width]) for at in range(0, len(pairs), width)]
        whole = _Step(run, passes)
        if not whole.tokens:
            raise ValueError("nothing in these rows is to be told")
        with self._prepared([run]), torch.no_grad():
            for turn in range(len(passes)):
                sums, gradient = self._pass([whole.share(turn)])[0]
                whole.add(sums, gradient)
        assert whole.sums is not None
        loss, hits = whole.sums.tolist()
        return Evaluation(loss, hits / whole.units, whole.tokens)

    def tell(self, run: Run, rows: Sequence[Row]) -> list[Telling]:
        """How the run tells each row as it is now; changes nothing. Each row must have something to be told."""
        told: list[Telling] = []
        with self._prepared([run]), torch.no_grad():
            for group in _groups([row.input_ids for row in rows]):
                share = _Share(run, run.weights, block([item([rows[at]]) for at in group]), 1)
                laid = self._laid([share])
                with self._serving([share], laid):
                    losses, hits = token_losses(self._hidden(laid), self._head, laid.trained, laid.targets)
                counts = [one.trained_tokens for one in share.block.items]
                for loss, hit in zip(losses.split(counts), hits.split(counts), strict=True):
                    told.append(Telling(loss.mean().item(), tuple(hit.tolist())))
        return told

    def answer(
        self, run: Run, prompts: Sequence[Sequence[int]], *, ends: Collection[int], most_tokens: int
    ) -> list[list[int]]:
        """The likeliest continuation of each prompt, token by token, up to one of `ends`, which is left out.

        Each token takes a pass over all of the row: no second model is in memory, and no cache of one.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        with self._prepared([run]), torch.no_grad():
            for group in _groups(prompts):
                going = list(group)
                for _ in range(most_tokens):
                    rows = [[*prompts[at], *answers[at]] for at in going]
                    going = [at for at, row in zip(going, rows, strict=True) if len(row) < self.longest]
                    rows = [row for row in rows if len(row) < self.longest]
                    if not rows:
                        break
                    following = self._next(run, rows)
                    for at, token in zip(going, following, strict=True):
                        answers[at].append(token)
                    going = [at for at, token in zip(going, following, strict=True) if token not in ends]
        return [answer[:-1] if answer and answer[-1] in ends else answer for answer in answers]

    def _next(self, run: Run, rows: Sequence[list[int]]) -> list[int]:
        """The likeliest token after each row."""
        share = _Share(run, run.weights, block([item([Row(row, [IGNORED] * len(row))]) for row in rows]), 1)
        laid = self._laid([share])
        last = [at * share.block.length + len(row) - 1 for at, row in enumerate(rows)]
        with self._serving([share], laid):
            hidden = self._hidden(laid)[0, torch.tensor(last, device=self.device)]
        return linear(hidden, self._head).argmax(-1).tolist()

    @contextmanager
    def _prepared(self, runs: Sequence[Run]) -> Iterator[None]:
        """Deterministic; layers are computed twice where a run asks for it, which changes no bits."""
        twice = any(run.spec.hyperparameters.gradient_checkpointing for run in runs)
        self._model.train(twice)  # transformers recomputes in training mode only; there is no dropout to wake
        if twice:
            self._model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            with deterministic(threads=self.threads):
                yield
        finally:
            if twice:
                self._model.gradient_checkpointing_disable()

    def _differentiated(self, runs: Sequence[Run]) -> list["_Step"]:
        """Each run's next step with its gradient; without one where there is not the memory for it, even alone."""
        steps = [_Step(run, run.micro_batches()) for run in runs]
        try:
            for turn in range(max(len(step.passes) for step in steps)):
                taking = [step for step in steps if turn < len(step.passes)]
                told = self._pass([step.share(turn) for step in taking])
                for step, (sums, gradient) in zip(taking, told, strict=True):
                    step.add(sums, gradient)
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        else:
            return steps
        # outside of the handler, whose traceback would hold on to the tensors
        if len(runs) == 1:
            return [_Step(runs[0], steps[0].passes)]
        del steps
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return [self._differentiated([run])[0] for run in runs]

    def _pass(self, shares: Sequence[_Share]) -> list[tuple[Tensor, Tensor]]:
        """Forward and, where gradients are on, backward: loss and hits (2,), and the gradient, of each share."""
        if self.level:
            shares = _levelled(shares)
        order = sorted(range(len(shares)), key=lambda at: _shape(shares[at]))
        ranked = [shares[at] for at in order]
        laid = self._laid(ranked)
        references = self._references(ranked)
        with self._serving(ranked, laid) as groups:
            losses, hits = token_losses(self._hidden(laid), self._head, laid.trained, laid.targets)
            loss, hit = _sums(ranked, laid.counts, losses, hits, references)
            if torch.is_grad_enabled():
                torch.autograd.backward(loss, torch.ones_like(loss))
        sums = torch.stack((loss.detach(), hit), 1).unbind()
        gradients = [gradient for group in groups for gradient in group.flat_gradients()]
        by_share = dict(zip(order, zip(sums, gradients, strict=True), strict=True))
        return [by_share[at] for at in range(len(shares))]

    def _laid(self, shares: Sequence[_Share]) -> Line:
        return line([share.block for share in shares], self.device, least=LEAST_ROWS * self.threads)

    def _hidden(self, laid: Line) -> Tensor:
        """(1, tokens, width), normed, as the output layer takes it."""
        decoder = self._model.get_decoder()
        return decoder(
            input_ids=laid.input_ids, position_ids=laid.positions, use_cache=False, stretches=laid.stretches
        ).last_hidden_state

    @torch.no_grad()
    def _references(self, shares: Sequence[_Share]) -> list[Tensor | None]:
        """Of the shares that learn from pairs: what the run began as, the base or the adapter that it goes on from,
        gives each answer, as log-probabilities (rows,)."""
        paired = [share for share in shares if share.dpo]
        if not paired:
            return [None] * len(shares)
        laid = self._laid(paired)
        began = [replace(share, weights=share.run.reference) for share in paired]
        with self._serving(began, laid):
            losses, _ = token_losses(self._hidden(laid), self._head, laid.trained, laid.targets)
        told = iter([_of_rows(*one) for one in zip(paired, losses.split(laid.counts), strict=True)])
        return [next(told) if share.dpo else None for share in shares]

    @contextmanager
    def _serving(self, shares: Sequence[_Share], laid: Line) -> Iterator[list["_Group"]]:
        """Let the layers serve these adapters, neighbours of one shape stacked, and the base to who has none."""
        parts: dict[str, list[Part]] = {}
        groups: list[_Group] = []
        for _, members in groupby(zip(shares, laid.starts, strict=True), lambda one: _shape(one[0])):
            grouped, starts = zip(*members, strict=True)
            weights = [share.weights for share in grouped if share.weights is not None]
            if not weights:
                continue
            group = _Group(grouped, weights, self._head.dtype)
            groups.append(group)
            for module, part in group.parts(starts[0], starts[-1] + grouped[-1].block.tokens):
                parts.setdefault(module, []).append(part)
        for module, serving in parts.items():
            self._layers[module].serving.parts = serving
        try:
            yield groups
        finally:
            for module in parts:
                self._layers[module].serving.parts = ()

    def _applied(self, steps: Sequence[_Step]) -> list[StepReport]:
        """Clip, move the weights, validate where it is time."""
        reports = [self._judged(*one) for one in zip(steps, _figures(steps), strict=True)]
        moving = []
        for step, report in zip(steps, reports, strict=True):
            if report.error is None and step.gradient is not None:
                moving.append((step.run, step.gradient, report))
                step.run.step = report.step
        _clip(moving)
        _adamw(moving)
        for at, (step, report) in enumerate(zip(steps, reports, strict=True)):
            if report.error is None and (found := self._validated(step.run)) is not None:
                reports[at] = replace(report, validation=found)
        return reports

    def _judged(self, step: _Step, figures: Sequence[float] | None) -> StepReport:
        """What is to be told of the step; a run that cannot go on is marked."""
        run, hp = step.run, step.run.spec.hyperparameters
        number = run.step + 1
        rate = hp.learning_rate * schedule.rate_factor(number, run.total_steps, hp)
        if figures is None:
            run.failed = OutOfMemory(number, self.cost(run))
            return StepReport(number, math.nan, 0.0, step.tokens, rate, math.nan, error=run.failed)
        loss, hits, length = figures
        if not math.isfinite(loss) or not math.isfinite(length):
            whose = (length, "gradient's length") if math.isfinite(loss) else (loss, "loss")
            run.failed = LossNotFinite(number, *whose)
            return StepReport(number, loss, 0.0, step.tokens, rate, length, error=run.failed)
        return StepReport(number, loss, hits / step.units, step.tokens, rate, length)

    def _validated(self, run: Run) -> Evaluation | None:
        """Validate if it is time; keep the weights if they are the best, end the run if that was too long ago."""
        hp, spec = run.spec.hyperparameters, run.spec
        due = run.step == run.total_steps or (hp.eval_steps is not None and run.step % hp.eval_steps == 0)
        if not spec.validation or not due:
            return None
        found = self.evaluate(run, spec.validation)
        if run.best is None or found.loss < run.best.loss:
            run.best, run.worse = Best(run.step, found.loss, run.weights.cpu().clone()), 0
        else:
            run.worse += 1
            run.stopped = hp.early_stopping_patience is not None and run.worse >= hp.early_stopping_patience
        return found


def _groups(rows: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Places of neighbouring rows that are read in one pass."""
    group: list[int] = []
    longest = 0
    for at, row in enumerate(rows):
        if group and max(longest, len(row)) * (len(group) + 1) > READ_TOKENS:
            yield group
            group, longest = [], 0
        group.append(at)
        longest = max(longest, len(row))
    if group:
        yield group


def _shape(share: _Share) -> tuple[object, ...]:
    """Shares of one shape can be computed as one."""
    return share.run.layout.signature, share.run.reference is None, share.block.length, len(share.block.items)


def _levelled(shares: Sequence[_Share]) -> list[_Share]:
    blocks = levelled([share.block for share in shares], [share.run.layout.signature for share in shares])
    return [replace(share, block=block) for share, block in zip(shares, blocks, strict=True)]


def _sums(
    shares: Sequence[_Share], counts: Sequence[int], losses: Tensor, hits: Tensor, references: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor]:
    """Each share's part of its run's loss, and its hits, both (shares,)."""
    units = losses.new_tensor([share.units for share in shares])
    loss, hit = _totals(losses, counts) / units, _totals(hits.to(losses.dtype), counts)
    if all(reference is None for reference in references):
        return loss, hit
    each = list(zip(loss.unbind(), hit.unbind(), strict=True))
    for at, (share, own, reference) in enumerate(zip(shares, losses.split(counts), references, strict=True)):
        if reference is not None:
            each[at] = _preference(share, own, reference)
    both = [torch.stack(column) for column in zip(*each, strict=True)]
    return both[0], both[1]


def _preference(share: _Share, losses: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and the hits of a share of pairs."""
    policy = _of_rows(share, losses)
    chosen, rejected = policy.chunk(2)
    chosen_before, rejected_before = reference.chunk(2)
    hp = share.run.spec.hyperparameters
    loss = dpo.loss(chosen, rejected, chosen_before, rejected_before, hp.beta).sum() / share.units
    if hp.sft_weight:
        better = losses[: _better_tokens(share.block.items)]
        loss = loss + hp.sft_weight * (better.sum() / share.better_tokens)
    gained = (chosen - chosen_before) > (rejected - rejected_before)
    return loss, gained.sum().to(loss.dtype)


def _better_tokens(items: Sequence[Item]) -> int:
    """Trained ones of the better answers, which come first."""
    return sum(item.trained_tokens for item in items[: len(items) // 2])


def _of_rows(share: _Share, losses: Tensor) -> Tensor:
    """Log-probability of each of the share's rows, from its tokens' losses."""
    return _totals(-losses, [item.trained_tokens for item in share.block.items])


def _totals(values: Tensor, counts: Sequence[int]) -> Tensor:
    """The sums of the first so many values, the next so many, and so on, each in the order of its own."""
    owners = torch.from_numpy(np.repeat(np.arange(len(counts)), counts)).to(values.device)
    sums = values.new_zeros(len(counts), dtype=torch.float64)  # one after the other, float32 would lose digits
    return sums.index_add(0, owners, values.double()).to(values.dtype)


def _figures(steps: Sequence[_Step]) -> list[list[float] | None]:
    """Loss, hits and the gradient's length of each step that has them, read at once: reading waits for the device."""
    found = [
        (step.run, step.sums, step.gradient) for step in steps if step.sums is not None and step.gradient is not None
    ]
    if not found:
        return [None] * len(steps)
    lengths = torch._foreach_norm([piece for run, _, gradient in found for piece in run.layout.pieces_of(gradient)])
    read = iter(torch.cat((*(sums for _, sums, _ in found), torch.stack(lengths))).tolist())
    sums = [[next(read), next(read)] for _ in found]
    told = iter([[*own, _length(run, read)] for (run, *_), own in zip(found, sums, strict=True)])
    return [None if step.gradient is None else next(told) for step in steps]


def _length(run: Run, pieces: Iterator[float]) -> float:
    """Of the gradient, from its next pieces' lengths: a weight that is kept times four has a fourth of its gradient."""
    return math.hypot(*[scale * next(pieces) for _, scale in run.layout.pieces])


def _clip(moving: Sequence[tuple[Run, Tensor, StepReport]]) -> None:
    """Shorten the gradients that are too long, as torch's clip_grad_norm_ does."""
    long: list[Tensor] = []
    factors: list[float] = []
    for run, gradient, report in moving:
        most = run.spec.hyperparameters.max_grad_norm
        if report.grad_norm > most:
            long.append(gradient)
            factors.append(most / (report.grad_norm + 1e-6))
    if long:
        torch._foreach_mul_(long, factors)


def _adamw(moving: Sequence[tuple[Run, Tensor, StepReport]]) -> None:
    """The fused kernel on each run's vectors, piece by piece; one call for all that share rate, decay and epsilon.

    What is kept times its scale moves by as many times the rate. Its gradient is as many times smaller, which leaves
    AdamW's quotient as it is but for epsilon. `lora_B` has a rate of its own with LoRA+.
    """
    if not moving:
        return
    numbers = [float(report.step) for _, _, report in moving]
    calls: dict[tuple[float, float, float], list[Sequence[Tensor]]] = {}
    for (run, gradient, report), step in zip(
        moving, torch.tensor(numbers, device=moving[0][1].device).unbind(), strict=True
    ):
        hp, gradients = run.spec.hyperparameters, run.layout.pieces_of(gradient)
        for at, ((_, scale), *piece) in enumerate(zip(run.layout.pieces, gradients, *run.pieces, strict=True)):
            rate = report.learning_rate * (hp.loraplus_ratio if at else 1) * scale
            shared = rate, hp.weight_decay / scale, EPSILON / scale
            calls.setdefault(shared, []).append((*piece, step))
    for (rate, decay, epsilon), called in calls.items():
        pieces, weights, first, second, steps = (list(column) for column in zip(*called, strict=True))
        torch._fused_adamw_(
            weights, pieces, first, second, [], steps,
            lr=rate, beta1=BETA1, beta2=BETA2, weight_decay=decay, eps=epsilon, amsgrad=False, maximize=False,
        )  # fmt: skip


def _check_output(model: PreTrainedModel) -> None:
    config, head = model.config, model.get_output_embeddings()
    scaled = [name for name in ("final_logit_softcapping", "logit_scale", "logits_scaling") if getattr(config, name, 0)]
    if head is None or head.bias is not None or scaled:
        raise TrainingFailed(f"the base's output layer has {', '.join(scaled) or 'a bias'}, which is not supported yet")


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: can't allocate memory" in str(error)
