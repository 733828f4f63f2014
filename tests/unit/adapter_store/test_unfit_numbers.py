"""I2: adapters with a number that is not finite, or gives none in the engine, are refused, however it comes to be.

Each is made from a seed: the dtypes of file and engine, rank, rsLoRA, place and way are drawn. A model of the engine's
arithmetic, written here in float64 without the inspection's bounds, says of each that it is unfit. The ordinary run
makes 300, `-m full` 5,000.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapter_store.base_model import BaseModel
from adapter_store.faults import Bounds, FaultCode
from adapter_store.inspection import inspect
from tests.bad_adapters import LAYERS, PREFIX, WIDTHS, Files, Tensor

Numbers = np.ndarray[Any, np.dtype[np.float64]]
ATTENTION = [name for name in WIDTHS if name.startswith("self_attn")]
MODULES = {f"model.layers.{layer}.{name}": WIDTHS[name] for layer in range(LAYERS) for name in ATTENTION}
BASE = BaseModel("base", "f" * 64, "LlamaForCausalLM", "float32", MODULES)
SERVED = ("float32", "float16", "bfloat16")
LARGEST = {"float32": 3.4028234663852886e38, "float16": 65_504.0, "bfloat16": 3.3895313892515355e38}
# Half a step above the largest: the first that is rounded to infinity.
OVERFLOWS = {"float32": 3.4028235677973366e38, "float16": 65_520.0, "bfloat16": 3.3961775292304e38}
STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
CODES = {
    FaultCode.NOT_FINITE, FaultCode.DTYPE_OVERFLOW, FaultCode.TOO_LARGE, FaultCode.ALPHA_INVALID,
    FaultCode.RANK_INVALID, FaultCode.CONFIG_NOT_JSON,
}  # fmt: skip


@dataclass
class Made:
    """An adapter in numbers: module → side → values as the file has them; `literal` stands for one in the config."""

    draw: np.random.Generator
    stored: str
    served: str
    rank: int
    config: dict[str, Any]
    values: dict[str, dict[str, Numbers]]
    literal: str = ""

    @property
    def module(self) -> str:
        """The one that is spoiled."""
        return str(self.draw.choice(list(self.values)))

    def scaling(self, module: str) -> float:
        """As PEFT has it, with what the config's literal means to a lenient parser."""
        config = json.loads(self.text().decode())
        alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
        rank = config["rank_pattern"].get(module, config["r"])
        try:
            return float(alpha) / (math.sqrt(rank) if config["use_rslora"] else rank)
        except (ZeroDivisionError, ValueError, OverflowError):
            return math.nan

    def text(self) -> bytes:
        return json.dumps(self.config).replace('"LITERAL"', self.literal).encode()

    def write(self, folder: Path) -> None:
        dtype = STORED[self.stored]
        tensors = {
            f"{PREFIX}{module}.{side}.weight": Tensor(dtype, list(numbers.shape), encode(numbers, self.stored))
            for module, sides in self.values.items()
            for side, numbers in sides.items()
        }
        Files(folder, {}, tensors, raw_config=self.text()).write()


def rounded(numbers: Numbers, dtype: str) -> Numbers:
    """Cast to the dtype and back, as the engine does: to nearest, past the largest to infinity."""
    with np.errstate(all="ignore"):
        if dtype != "bfloat16":
            return numbers.astype(dtype).astype(np.float64)
        bits = numbers.astype(np.float32).view(np.uint32).astype(np.uint64)
        upper = np.where(np.isfinite(numbers), bits + 0x7FFF + ((bits >> 16) & 1), bits) & 0xFFFF0000
        return upper.astype(np.uint32).view(np.float32).astype(np.float64)


def encode(numbers: Numbers, dtype: str) -> bytes:
    with np.errstate(all="ignore"):
        if dtype == "bfloat16":
            return (rounded(numbers, dtype).astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
        return numbers.astype({"float32": "<f4", "float16": "<f2"}[dtype]).tobytes()


def is_fit(made: Made) -> bool:
    """Whether cast, scaling and product stay finite in the serving dtype, for every module."""
    for module, sides in made.values.items():
        with np.errstate(all="ignore"):
            side_a, side_b = (rounded(rounded(sides[side], made.stored), made.served) for side in ("lora_A", "lora_B"))
            scaled = rounded(side_b * made.scaling(module), made.served)
            product = rounded(scaled @ side_a, made.served)
        if not all(np.isfinite(numbers).all() for numbers in (side_a, side_b, scaled, product)):
            return False
    return True


def harmless(seed: int) -> Made:
    draw = np.random.default_rng(seed)
    rank = int(draw.choice([1, 4, 8]))
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "base", "r": rank,
        "lora_alpha": 2 * rank, "use_rslora": bool(draw.integers(2)), "target_modules": "all-linear",
        "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    values = {
        module: {"lora_A": draw.normal(0, 0.05, (rank, into)), "lora_B": draw.normal(0, 0.05, (out, rank))}
        for module, (into, out) in MODULES.items()
    }
    return Made(draw, str(draw.choice(SERVED)), str(draw.choice(SERVED)), rank, config, values)


def put(made: Made, side: str, value: float) -> None:
    numbers = made.values[made.module][side]
    numbers[made.draw.integers(numbers.shape[0]), made.draw.integers(numbers.shape[1])] = value


def between(made: Made, least: float, most: float) -> float:
    """Drawn evenly over the magnitudes, either sign."""
    return float(np.exp(made.draw.uniform(np.log(least), np.log(most))) * made.draw.choice([-1, 1]))


def not_finite(made: Made) -> None:
    """NaN or an infinity in the file."""
    put(made, str(made.draw.choice(["lora_A", "lora_B"])), float(made.draw.choice([np.nan, np.inf, -np.inf])))


def overflow_by_cast(made: Made) -> None:
    """Finite in the file, infinite in the dtype that it is served in."""
    made.stored, made.served = str(made.draw.choice(["float32", "bfloat16"])), "float16"
    if made.draw.integers(2):
        made.stored, made.served = "float32", "bfloat16"
    least = OVERFLOWS[made.served] * 1.0000001 if made.served == "bfloat16" else 66_000
    put(made, str(made.draw.choice(["lora_A", "lora_B"])), between(made, least, LARGEST[made.stored]))


def overflow_by_scaling(made: Made) -> None:
    """Finite after the cast, infinite after alpha / r or alpha / √r, by the config or by a pattern."""
    made.stored = "float32" if made.stored == "float16" else made.stored
    divisor = math.sqrt(made.rank) if made.config["use_rslora"] else made.rank
    least = 1.02 * OVERFLOWS[made.served] / (65_536 / divisor)
    put(made, "lora_B", between(made, least, LARGEST[made.served] / 1.01))
    module = next(m for m, sides in made.values.items() if np.abs(sides["lora_B"]).max() > 1)
    peak = float(np.abs(made.values[module]["lora_B"]).max())
    needed = 1.01 * OVERFLOWS[made.served] / peak * divisor
    alpha = float(made.draw.uniform(min(needed, 65_535), 65_536))
    if made.draw.integers(2):
        made.config["alpha_pattern"] = {module: alpha}
    else:
        made.config["lora_alpha"] = alpha


def overflow_by_product(made: Made) -> None:
    """Both sides finite, what they multiply to is not."""
    made.stored = "float32" if made.stored == "float16" else made.stored
    made.config["lora_alpha"] = made.rank
    made.config["use_rslora"] = False
    root = math.sqrt(OVERFLOWS[made.served] / made.rank)
    ratio = float(made.draw.uniform(0.1, 10))
    module = made.module
    made.values[module]["lora_A"][:] = 1.01 * root * ratio
    made.values[module]["lora_B"][made.draw.integers(made.values[module]["lora_B"].shape[0])] = 1.01 * root / ratio


def alpha_by_literal(made: Made) -> None:
    """The config's own number is not finite, or makes none that is."""
    literals = ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "-" + "9" * 400, "1e308", "1e45")
    made.literal = str(made.draw.choice(literals))
    if made.draw.integers(2):
        made.config["alpha_pattern"] = {made.module: "LITERAL"}
    else:
        made.config["lora_alpha"] = "LITERAL"


def rank_by_literal(made: Made) -> None:
    """A rank by which nothing can be divided."""
    made.literal = str(made.draw.choice(["0", "0.0", "-0.0", "NaN", "1e-320", "1e-310"]))
    if made.draw.integers(2):
        made.config["rank_pattern"] = {made.module: "LITERAL"}
    else:
        made.config["r"] = "LITERAL"


WAYS: tuple[Callable[[Made], None], ...] = (
    not_finite, overflow_by_cast, overflow_by_scaling, overflow_by_product, alpha_by_literal, rank_by_literal,
)  # fmt: skip


def unfit(count: int) -> Iterator[tuple[str, Made]]:
    for seed in range(count):
        made = harmless(seed)
        way = WAYS[seed % len(WAYS)]
        way(made)
        assert not is_fit(made), f"seed {seed}, {way.__name__}: it is fit after all"
        yield way.__name__, made


def none_is_accepted(count: int, folder: Path) -> None:
    codes: Counter[str] = Counter()
    dtypes: set[tuple[str, str]] = set()
    for seed, (way, made) in enumerate(unfit(count)):
        made.write(folder)
        inspection = inspect(folder, replace(BASE, dtype=made.served), Bounds())
        assert inspection.faults, f"seed {seed}, {way}: accepted"
        assert inspection.config == b""
        assert CODES & {fault.code for fault in inspection.faults}, f"seed {seed}, {way}: {inspection.faults}"
        codes.update(fault.code for fault in inspection.faults)
        dtypes.add((made.stored, made.served))
    assert codes.keys() >= CODES
    assert len(dtypes) == 9


def test_none_of_300_unfit_adapters_is_accepted(tmp_path: Path) -> None:
    """The scaled figure of I2."""
    none_is_accepted(300, tmp_path)


@pytest.mark.full
@pytest.mark.timeout(1_800)
def test_none_of_5000_unfit_adapters_is_accepted(tmp_path: Path) -> None:
    """I2's figure."""
    none_is_accepted(5_000, tmp_path)


def test_without_the_one_number_they_are_accepted(tmp_path: Path) -> None:
    """What the unfit adapters are made from passes in every dtype: the refusals above are for that number."""
    for seed in range(30):
        made = harmless(seed)
        assert is_fit(made)
        made.write(tmp_path)
        assert inspect(tmp_path, replace(BASE, dtype=made.served), Bounds()).faults == ()


@pytest.mark.parametrize("served", SERVED)
def test_what_the_bounds_let_through_stays_finite(served: str, tmp_path: Path) -> None:
    """At the bounds themselves the engine's arithmetic has room: accepted adapters near them are fit."""
    accepted = 0
    for seed in range(60):
        made = harmless(seed)
        made.stored, made.served = "float32", served
        module = made.module
        for side in ("lora_A", "lora_B"):
            made.values[module][side] *= between(made, 1, 1e4)
        made.config["lora_alpha"] = abs(between(made, 1, 65_536))
        made.write(tmp_path)
        if not inspect(tmp_path, replace(BASE, dtype=served), Bounds()).faults:
            accepted += 1
            assert is_fit(made)
    assert accepted >= 5
