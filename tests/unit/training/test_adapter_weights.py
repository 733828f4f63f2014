"""PEFT's two files, as a run writes them."""

from pathlib import Path

from safetensors import safe_open

from training.adapter_weights import CONFIG, WEIGHTS, fresh, plan, write
from training.hyperparameters import Hyperparameters


def test_the_same_weights_are_the_same_bytes(tmp_path: Path) -> None:
    """Whatever order safetensors has the metadata in, which is another with each call; and it reads them back."""
    hp = Hyperparameters(rank=2, target_modules=("q_proj",))
    layout = plan({"model.layers.0.self_attn.q_proj": (8, 8)}, hp)
    written = set()
    for number in range(20):
        folder = tmp_path / str(number)
        folder.mkdir()
        write(layout, fresh(layout, seed=1), folder, hp, "base", "sha256:abc")
        written.add(((folder / CONFIG).read_bytes(), (folder / WEIGHTS).read_bytes()))
    assert len(written) == 1
    with safe_open(tmp_path / "0" / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt", "tailor.base_fingerprint": "sha256:abc"}
        assert len(list(file.keys())) == 2
