"""Pure: how factors are spelled, and what a scaled config says."""

import json

import pytest

from adapter_store.errors import FactorInvalid
from adapter_store.scaling import Scaling, read_factor, read_scaling, scaled_config, spelled


@pytest.mark.parametrize(
    ("text", "factor", "shortest"),
    [("0.7", 7000, "0.7"), ("0.70", 7000, "0.7"), ("1", 10000, "1"), ("0.0001", 1, "0.0001"), ("2.0", 20000, "2")],
)
def test_a_factor_has_one_value_however_it_is_spelled(text: str, factor: int, shortest: str) -> None:
    assert read_factor(text) == factor
    assert spelled(factor) == shortest
    assert read_scaling(f"3*{text}") == Scaling(3, factor)
    assert str(Scaling(3, factor)) == f"3*{shortest}"


@pytest.mark.parametrize(
    "text", ["0", "0.0", "2.0001", "3", "-1", ".7", "0.", "0.12345", "1e0", "0.7 ", " 1", "٣", "", "0,7"]
)
def test_nothing_else_is_a_factor(text: str) -> None:
    with pytest.raises(FactorInvalid, match="not a factor"):
        read_factor(text)
    assert read_scaling(f"3*{text}") is None


def test_a_scaled_config_differs_in_its_alphas_alone() -> None:
    """0.7 of 16 is 11.2 and no other float; a module's own alpha is scaled as well."""
    config = {"r": 8, "lora_alpha": 16, "alpha_pattern": {"q_proj": 32}, "rank_pattern": {"q_proj": 4}}
    assert json.loads(scaled_config(json.dumps(config).encode(), 7000)) == {
        **config,
        "lora_alpha": 11.2,
        "alpha_pattern": {"q_proj": 22.4},
    }
