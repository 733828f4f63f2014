"""Which factor is picked, on curves whose best is known; what is asked, `test_tasks_learned` shows on a real base."""

from pathlib import Path

import pytest

from training.blend import Blend, Point, draw, picked

# the task comes at half of the adapter, and general answers go from 0.8 of it on
CURVE = [Point(at / 10, float(at >= 5), 1.0 if at <= 7 else 0.4) for at in range(11)]


def test_the_factor_that_keeps_most_of_both_is_picked() -> None:
    """Of equals the one that is most of the adapter; with a share of the task given, the best general score."""
    assert picked(CURVE)[0] == Point(0.7, 1.0, 1.0)
    slope = [Point(at / 10, at / 10, 1 - 0.8 * at / 10) for at in range(11)]
    assert picked(slope)[0].factor == 0.6  # 0.6 of the task and 0.52 of the rest; at 0.5: 0.5 and 0.6
    point, rule = picked(slope, least_task=0.8)
    assert (point.factor, "0.8" in rule) == (0.8, True)


def test_nothing_to_keep_is_an_error() -> None:
    """Rather than a factor that means nothing."""
    with pytest.raises(ValueError, match="no question of its task"):
        picked([Point(0, 0.0, 1.0), Point(1, 0.0, 1.0)])
    with pytest.raises(ValueError, match="no general question"):
        picked([Point(0, 0.0, 0.0), Point(1, 1.0, 0.0)])


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    """As a PNG of some size."""
    draw(Blend(tuple(CURVE), CURVE[7], "rule"), tmp_path / "curve.png")
    content = (tmp_path / "curve.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert len(content) > 5_000
