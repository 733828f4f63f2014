"""Which versions may answer when, as a run's actions move them."""

from loadtests.recording import ABSENT
from loadtests.tenants import Adapter, Lives, Version


def test_a_deletion_is_told_with_its_begin() -> None:
    """Nobody knows when between its begin and its answer the server did it."""
    lives, adapter = Lives(), Adapter("acme-0", "adapter-0")
    lives.begin(adapter, Version(1, "old"), 0)
    lives.end(adapter, "old", 5)
    lives.begin(adapter, Version(2, "new"), 4)
    lives.end(adapter, "new", 9, leaving=7)
    assert [(one.until, one.leaving) for one in lives.all()] == [(5, ABSENT), (9, 7)]
