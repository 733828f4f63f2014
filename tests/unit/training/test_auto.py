"""The rules behind "auto", one by one, and that they teach the tiny base its jargon."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import auto, tiny_base
from training.evaluation import Answerer
from training.hyperparameters import Hyperparameters
from training.metrics import exact_match
from training.recipe import train
from training.rows import Method
from training.tasks import jargon, write_jsonl


@pytest.mark.parametrize(
    ("examples", "tokens", "batch_size", "n_epochs"),
    [
        (1, 20, 1, 25),
        (10, 500, 2, 25),
        (96, 2_000, 8, 17),
        (1_000, 200_000, 16, 4),
        (1_000, 40_000_000, 1, 3),
        (5_000, None, 32, 3),
        (20_000, 4_000_000, 32, 1),
        (1_000_000, None, 32, 1),
    ],
)
def test_batches_and_epochs_follow_the_file(examples: int, tokens: int | None, batch_size: int, n_epochs: int) -> None:
    """Small files have small batches and many passes, large ones few, long rows few a step."""
    chosen = auto.choose("supervised", examples=examples, tokens=tokens, hidden_size=2_048)
    assert (chosen.batch_size, chosen.n_epochs) == (batch_size, n_epochs)


@pytest.mark.parametrize(
    ("hidden_size", "learning_rate"),
    [(128, 4.26e-3), (896, 9.35e-4), (2_000, 5e-4), (4_096, 2.86e-4), (8_192, 1.66e-4)],
)
def test_the_rate_falls_with_the_width_of_the_base(hidden_size: int, learning_rate: float) -> None:
    """And is a quarter of it for preferences."""
    assert auto.rate("supervised", hidden_size) == pytest.approx(learning_rate, rel=0.01)
    assert auto.rate("dpo", hidden_size) == auto.rate("supervised", hidden_size) / 4


@given(
    st.sampled_from(["supervised", "dpo"]),
    st.integers(0, 10**7),
    st.none() | st.integers(0, 10**10),
    st.integers(1, 10**5),
)
def test_every_choice_is_within_what_the_api_takes(
    method: Method, examples: int, tokens: int | None, hidden_size: int
) -> None:
    """Whatever the file and the base."""
    chosen = auto.choose(method, examples=examples, tokens=tokens, hidden_size=hidden_size)
    assert 1 <= chosen.n_epochs <= 50
    assert 1 <= chosen.batch_size <= 256
    assert 0 < chosen.learning_rate <= 1
    assert 0 < chosen.beta <= 2


def test_the_width_of_a_base_is_what_most_of_its_layers_read() -> None:
    """Not the inner width of its feed-forward layers, nor that of its heads."""
    layer = {"q_proj": (64, 96), "k_proj": (64, 32), "o_proj": (96, 64), "up_proj": (64, 256), "down_proj": (256, 64)}
    assert auto.width({f"model.layers.{n}.{name}": widths for n in range(2) for name, widths in layer.items()}) == 64


@pytest.mark.full
@pytest.mark.timeout(1_200)  # the tiny base is made first
def test_auto_teaches_the_tiny_base_its_jargon(tmp_path: Path) -> None:
    """At least nine of ten held-out wordings are answered right, with nothing chosen by hand."""
    base = tiny_base.build(tmp_path / "base").path
    task = jargon(0)
    write_jsonl(task.train, tmp_path / "data.jsonl")
    chosen = auto.choose("supervised", examples=len(task.train), tokens=None, hidden_size=tiny_base.DEFAULT.hidden_size)
    result = train(
        tmp_path / "data.jsonl",
        base=base,
        out=tmp_path / "adapter",
        threads=1,
        hyperparameters=Hyperparameters(
            epochs=chosen.n_epochs, batch_size=chosen.batch_size, learning_rate=chosen.learning_rate, max_length=512
        ),
    )
    answers = [*map(Answerer(base, result.out), (example.messages for example in task.heldout))]
    assert exact_match([example.answer for example in task.heldout], answers) >= 0.9
