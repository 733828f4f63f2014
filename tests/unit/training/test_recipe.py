import json
import math
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from pydantic import ValidationError
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from training import dataset, recipe, tasks
from training.dataset import DatasetInvalid
from training.failures import LossNotFinite, TrainingFailed
from training.hyperparameters import Hyperparameters
from training.output_folder import OutputExists
from training.progress import Progress

QUICK = Hyperparameters(rank=4, lora_alpha=8, epochs=1, batch_size=4, learning_rate=1e-2, max_length=512)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen rows of unequal length."""
    path = tmp_path_factory.mktemp("data") / "train.jsonl"
    tasks.write_jsonl(tasks.jargon(0, terms=4).train, path)
    return path


def with_(**changes: object) -> Hyperparameters:
    return Hyperparameters.model_validate(QUICK.model_dump() | changes)


def weights(out: Path) -> dict[str, torch.Tensor]:
    loaded: dict[str, torch.Tensor] = load_file(out / "adapter_model.safetensors")
    return loaded


def test_the_result_is_two_files_that_peft_loads(base: Path, data: Path, tmp_path: Path) -> None:
    """Config and weights alone are written, and PEFT finds every weight it expects in them."""
    result = recipe.train(data, base=base, out=tmp_path / "adapter", hyperparameters=QUICK)
    assert {path.name for path in result.out.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), result.out)
    loaded = {name: value for name, value in model.named_parameters() if "lora_" in name}
    assert {name.replace(".default", "") for name in loaded} == set(weights(result.out))
    assert all(torch.equal(value, weights(result.out)[name.replace(".default", "")]) for name, value in loaded.items())


def test_the_adapter_names_its_base(base: Path, data: Path, tmp_path: Path) -> None:
    """The base's folder name stands in the config, and the caller's fingerprint in the weights' metadata."""
    out = tmp_path / "adapter"
    recipe.train(data, base=base, out=out, hyperparameters=with_(max_steps=1), base_fingerprint="sha256:abc")
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "small-base"
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (4, 8, True)
    assert sorted(config["target_modules"]) == sorted(QUICK.target_modules)
    with safe_open(out / "adapter_model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt", "tailor.base_fingerprint": "sha256:abc"}


def test_the_same_inputs_give_the_same_bytes(base: Path, data: Path, tmp_path: Path) -> None:
    """Two runs agree in every byte of both files; a run with another seed does not."""
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        torch.rand(3)  # what happened before in the process must not matter
        recipe.train(data, base=base, out=tmp_path / name, hyperparameters=with_(seed=seed))
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert not torch.equal(*(next(iter(weights(tmp_path / name).values())) for name in ("one", "other")))


def test_training_leaves_torch_as_it_was(base: Path, data: Path, tmp_path: Path) -> None:
    """Neither the random state nor the deterministic mode of the process changes."""
    before = torch.get_rng_state()
    recipe.train(data, base=base, out=tmp_path / "adapter", hyperparameters=with_(max_steps=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.are_deterministic_algorithms_enabled()


def test_accumulation_equals_the_full_batch(base: Path, data: Path, tmp_path: Path) -> None:
    """Four passes of four unequal rows train like one pass of sixteen: every token counts the same."""
    cuts = {"whole": (16, 1), "cut": (4, 4), "ragged": (5, 4)}
    losses = {}
    for name, (batch_size, accumulation) in cuts.items():
        hp = with_(batch_size=batch_size, gradient_accumulation_steps=accumulation, max_steps=1, max_grad_norm=1000)
        losses[name] = recipe.train(data, base=base, out=tmp_path / name, hyperparameters=hp).losses
    assert losses["cut"] == pytest.approx(losses["whole"], abs=1e-6)
    assert losses["ragged"] == pytest.approx(losses["whole"], abs=1e-6)


def test_the_loss_falls_and_is_reported(base: Path, data: Path, tmp_path: Path) -> None:
    """Progress, result and data agree on steps, losses and tokens, and training does train."""
    heard: list[Progress] = []
    hp = with_(epochs=4)
    result = recipe.train(data, base=base, out=tmp_path / "adapter", hyperparameters=hp, on_progress=heard.append)
    assert [progress.step for progress in heard] == list(range(1, 17))
    assert {progress.total for progress in heard} == {result.steps} == {16}
    assert [progress.loss for progress in heard] == result.losses
    assert result.losses[-1] < result.losses[0] - 0.2
    assert result.seconds > 0


def test_trained_tokens_count_each_epoch(
    base: Path, data: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """The bill is the number of labelled tokens times the epochs."""
    once = sum(row.trained_tokens for row in dataset.load(data, tokenizer, max_length=512))
    result = recipe.train(data, base=base, out=tmp_path / "adapter", hyperparameters=with_(epochs=2))
    assert result.trained_tokens == 2 * once


def test_a_loss_that_is_not_finite_names_its_step(base: Path, data: Path, tmp_path: Path) -> None:
    """A diverged run ends with the step in the error, and leaves nothing behind."""
    broken = tmp_path / "models" / "broken-base"
    broken.mkdir(parents=True)
    for path in base.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    poison(broken / "model.safetensors")
    with pytest.raises(LossNotFinite, match="the loss is nan at step 1") as caught:
        recipe.train(data, base=broken, out=tmp_path / "adapters" / "adapter", hyperparameters=QUICK)
    assert caught.value.step == 1
    assert list((tmp_path / "adapters").iterdir()) == []


def poison(path: Path) -> None:
    from safetensors.torch import save_file

    tensors = load_file(path)
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, path, {"format": "pt"})


def test_a_taken_place_is_refused_before_work_starts(base: Path, tmp_path: Path) -> None:
    """Not even the data is read when `out` exists."""
    with pytest.raises(OutputExists, match="already exists"):
        recipe.train(tmp_path / "no-such-data", base=base, out=tmp_path, hyperparameters=QUICK)


def test_bad_data_leaves_nothing(base: Path, tmp_path: Path) -> None:
    """Faulty data ends the run before training, and no folder appears, staged or whole."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text("{}\n")
    with pytest.raises(DatasetInvalid):
        recipe.train(bad, base=base, out=tmp_path / "adapters" / "adapter", hyperparameters=QUICK)
    assert list((tmp_path / "adapters").iterdir()) == []


def test_a_failing_callback_leaves_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    """Whatever interrupts training, a cancel or Ctrl-C, the staging folder goes with it."""

    def interrupt(progress: Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recipe.train(data, base=base, out=tmp_path / "adapters" / "a", hyperparameters=QUICK, on_progress=interrupt)
    assert list((tmp_path / "adapters").iterdir()) == []


def test_rows_longer_than_the_base_are_faults(base: Path, tmp_path: Path) -> None:
    """The base's own context bounds `max_length`, whatever was asked for."""
    long = [tasks.Example([{"role": "user", "content": "x " * 600}], "y")]
    tasks.write_jsonl(long, tmp_path / "long.jsonl")
    with pytest.raises(DatasetInvalid, match="max_length is 512"):
        recipe.train(tmp_path / "long.jsonl", base=base, out=tmp_path / "a", hyperparameters=with_(max_length=4096))


def test_target_modules_the_base_lacks_are_named(base: Path, data: Path, tmp_path: Path) -> None:
    """A wrong module name is told beside the names there are; the output layer cannot be adapted."""
    for name in ("c_attn", "lm_head"):
        with pytest.raises(TrainingFailed, match=rf"no linear layers named {name}; it has down_proj, gate_proj"):
            recipe.train(
                data, base=base, out=tmp_path / "adapter", hyperparameters=with_(target_modules=["q_proj", name])
            )


@pytest.mark.parametrize(
    "bad",
    [
        {"rank": 0},
        {"rank": 513},
        {"lora_alpha": 0},
        {"lora_alpha": math.nan},
        {"learning_rate": math.inf},
        {"learning_rate": -1e-4},
        {"target_modules": []},
        {"target_modules": [".*"]},
        {"epochs": 0},
        {"batch_size": 0},
        {"gradient_accumulation_steps": 0},
        {"max_steps": 0},
        {"max_length": 1},
        {"warmup_ratio": 1.5},
        {"schedule": "stairs"},
        {"weight_decay": -1},
        {"seed": -1},
        {"learning_rat": 1e-4},
    ],
    ids=str,
)
def test_hyperparameters_out_of_bounds_are_refused(bad: dict[str, object]) -> None:
    """Every number has a bound, module names are names and not patterns, and a misspelt field is an error."""
    with pytest.raises(ValidationError):
        Hyperparameters.model_validate(bad)
