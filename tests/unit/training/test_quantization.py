"""Training on a base in four bits: what it costs in exactness, and that the adapter is one like any other."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast

from training import dataset, tasks
from training.dataset import Row
from training.determinism import reproducible
from training.engine import Engine, Run, Spec
from training.hyperparameters import Hyperparameters
from training.material import Material
from training.quantization import packer
from training.warm_base import WarmBase

HP = Hyperparameters(rank=4, lora_alpha=8, epochs=2, batch_size=4, learning_rate=1e-2, quantization="nf4")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with reproducible(0, threads=1):
        yield


@pytest.fixture(scope="module")
def engine(base: Path) -> Engine:
    return Engine(base, device="cpu", threads=1, quantization="nf4")


@pytest.fixture
def rows(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> list[Row]:
    tasks.write_jsonl(tasks.jargon(0, terms=4).train, tmp_path / "train.jsonl")
    return dataset.load(tmp_path / "train.jsonl", tokenizer, max_length=512)


def trained(engine: Engine, *specs: Spec) -> list[Run]:
    runs = [engine.begin(spec) for spec in specs]
    while not runs[0].done:
        for report in engine.step(runs):
            assert report.error is None
    return runs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_weight_is_an_eighth_or_a_quarter_and_a_tenth_off(dtype: torch.dtype) -> None:
    weight = torch.randn(256, 192).to(dtype) * 0.02
    packed = packer(torch.device("cpu"))(weight)
    again = packed()
    assert again.dtype == dtype
    assert torch.equal(again, packed())
    off = torch.linalg.vector_norm(again.float() - weight.float()) / torch.linalg.vector_norm(weight.float())
    assert 0.05 < off < 0.11
    assert packed.bytes <= weight.numel() * 0.55


def test_the_base_in_four_bits_says_what_transformers_and_bitsandbytes_say(
    engine: Engine, base: Path, rows: list[Row]
) -> None:
    """Their own layers on the same packing, as a reference for ours; the plain base says something else."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    theirs.train()  # in inference, on processors that can, its layers multiply in bfloat16 whatever they are told
    ours = engine.evaluate(engine.begin(Spec("supervised", HP, rows)), rows).loss
    plain = Engine(base, device="cpu", threads=1)
    unpacked = plain.evaluate(plain.begin(Spec("supervised", HP.model_copy(update={"quantization": None}), rows)), rows)
    assert ours == pytest.approx(loss_of(theirs, rows), abs=1e-5)
    assert ours != pytest.approx(unpacked.loss, abs=1e-5)
    assert ours == pytest.approx(unpacked.loss, abs=0.1)


def loss_of(model: object, rows: list[Row]) -> float:
    losses: list[Tensor] = []
    with torch.no_grad():
        for row in rows:
            ids, labels = (torch.tensor([values]) for values in (row.input_ids, row.labels))
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()  # type: ignore[operator]
            trained = labels[0, 1:] >= 0
            losses.append(cross_entropy(logits[trained], labels[0, 1:][trained], reduction="none"))
    return float(torch.cat(losses).mean())


def test_what_is_trained_on_four_bits_is_an_ordinary_adapter(
    engine: Engine, base: Path, rows: list[Row], tmp_path: Path
) -> None:
    """PEFT loads it onto the whole base, where it helps about as much as on the packed one."""
    run = trained(engine, Spec("supervised", HP, rows))[0]
    before = engine.evaluate(engine.begin(run.spec), rows).loss
    after = engine.evaluate(run, rows).loss
    run.write_adapter(tmp_path)
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    served = loss_of(PeftModel.from_pretrained(whole, tmp_path).eval(), rows)
    assert before - after > 0.4
    assert served == pytest.approx(after, abs=0.05)


def test_runs_beside_each_other_keep_their_bits(engine: Engine, rows: list[Row]) -> None:
    specs = [Spec("supervised", HP.model_copy(update={"rank": rank, "seed": rank}), rows) for rank in (4, 9)]
    for run, spec in zip(trained(engine, *specs), specs, strict=True):
        assert torch.equal(run.weights, trained(engine, spec)[0].weights)


def test_a_run_gets_the_base_that_it_wants(engine: Engine, rows: list[Row]) -> None:
    with pytest.raises(ValueError, match="wants quantization None, and the base has nf4"):
        engine.begin(Spec("supervised", HP.model_copy(update={"quantization": None}), rows))


def test_a_worker_trains_both_kinds_side_by_side(base: Path, tmp_path: Path) -> None:
    """Each as it is alone."""
    tasks.write_jsonl(tasks.jargon(0, terms=4).train, tmp_path / "train.jsonl")
    warm = WarmBase(base, fingerprint="sha256:0", device="cpu", threads=1)

    def begun(quantization: str | None) -> Run:
        recipe = HP.model_copy(update={"quantization": quantization}).model_dump(mode="json")
        return warm.begin(Material("supervised", recipe, tmp_path / "train.jsonl", None, None, tmp_path / "none"))

    runs = [begun("nf4"), begun(None)]
    assert [report.step for report in warm.step(runs)] == [1, 1]
    alone = [begun(None), begun("nf4")]
    for run in alone:
        warm.step([run])
    assert all(torch.equal(run.weights, one.weights) for run, one in zip(runs, reversed(alone), strict=True))
    assert not torch.equal(runs[0].weights, runs[1].weights)


def test_without_bitsandbytes_it_is_said_what_to_install(base: Path) -> None:
    """In a Python that cannot import it."""
    program = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from pathlib import Path\nfrom training.engine import Engine\nfrom training.failures import TrainingFailed\n"
        "from training.material import job_error\n"
        f"try: Engine(Path({str(base)!r}), quantization='nf4')\n"
        "except TrainingFailed as error: print(job_error(error).code, error)\n"
    )
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.startswith("quantization_missing quantization needs bitsandbytes")
    assert "install tailor[qlora]" in told
