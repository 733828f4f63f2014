"""The lock of a home folder, by which one `tailor up` alone uses it."""

import fcntl
import os
import threading
from pathlib import Path

import pytest

from gateway.home import ConfigurationError, Home
from gateway.stack import StackState, _only_stack_of, _running


def test_a_second_stack_is_refused(tmp_path: Path) -> None:
    """While the first one runs, whose state can be read; after it nobody's is told."""
    home = Home(tmp_path)
    for _ in range(2):
        with _only_stack_of(home):
            assert _running(home) == StackState(os.getpid())
            with pytest.raises(ConfigurationError, match="Another 'tailor up' uses"), _only_stack_of(home):
                pass
        assert _running(home) is None


def test_a_look_at_the_lock_is_no_other_stack(tmp_path: Path) -> None:
    """Whoever asks whether one runs holds it for a moment."""
    home = Home(tmp_path)
    with _only_stack_of(home):
        pass
    with (tmp_path / "up.lock").open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        threading.Timer(0.1, fcntl.flock, (looking, fcntl.LOCK_UN)).start()
        with _only_stack_of(home):
            assert _running(home) == StackState(os.getpid())
