"""A job's losses as they are drawn."""

import io
from typing import Any

from rich.console import Console

from gateway.loss_curve import LossCurve, curve


def test_a_curve_goes_from_its_highest_loss_to_its_lowest() -> None:
    """The first point is at the top left, the last one at the bottom right, and both losses stand beside it."""
    rows = curve([(1, 4.0), (2, 2.0), (3, 1.0)], width=4, height=3)
    assert len(rows) == 3
    assert rows[0].startswith("   4.0000 ")
    assert rows[2].startswith("   1.0000 ")
    assert (rows[0][10], rows[2][13]) == (chr(0x2801), chr(0x2880))


def test_no_points_and_one_point() -> None:
    """Nothing to draw, and a curve that does not fall."""
    assert curve([]) == []
    assert len(curve([(1, 2.0)], width=4, height=3)) == 3


def test_the_picture_says_where_the_job_is() -> None:
    """Its id, state, step and losses, the curve, and the last that it said."""
    out = io.StringIO()
    job: dict[str, Any] = {"id": "ftjob-1", "status": "running", "tailor": {"step": 2, "total_steps": 9}}
    metrics = {"type": "metrics", "message": "", "data": {"step": 2, "train_loss": 0.5, "valid_loss": 0.75}}
    said = {"type": "message", "message": "Checkpoint created at step 2", "data": {}}
    with LossCurve(Console(file=out, force_terminal=True, width=100)) as shown:
        shown.show(job, [metrics, said])
    for part in ("ftjob-1  running  step 2/9  loss 0.5000  validation 0.7500", "Checkpoint created at step 2"):
        assert part in out.getvalue()
