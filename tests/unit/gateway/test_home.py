"""The secrets of a home folder: made once, whole, by whoever comes first, and never taken empty."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from gateway.home import ConfigurationError, Home

WRITERS, HOMES = 8, 50


def test_writers_of_one_process_number_make_one_secret(tmp_path: Path) -> None:
    """As containers on one new volume: each gets the secret that is kept, and leaves nothing beside it."""
    together = Barrier(WRITERS)

    def make(home: Home) -> str:
        together.wait(60)
        return home.replica_token(None)

    with ThreadPoolExecutor(WRITERS) as threads:
        for number in range(HOMES):
            home = Home(tmp_path / f"home-{number}")
            told = set(threads.map(make, [home] * WRITERS))
            assert told == {home.replica_token(None)}
            (file,) = home.path.iterdir()
            assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_an_empty_secret_is_refused(tmp_path: Path) -> None:
    """A power cut under an older version left such files: with one, anybody's empty token would be right."""
    home = Home(tmp_path)
    for name, read in (("replica-token", home.replica_token), ("signing-key", home.signing_key)):
        (tmp_path / name).touch(mode=0o600)
        with pytest.raises(ConfigurationError, match=f"{name} is empty.* remove it"):
            read(None)
        (tmp_path / name).unlink()
        assert read(None) == read(None)


def test_an_operators_key_is_written_over_another(tmp_path: Path) -> None:
    """The last one counts; nothing in its file is no key."""
    home = Home(tmp_path)
    assert home.operator_key() is None
    home.operator_key_file.touch(mode=0o600)
    assert home.operator_key() is None
    for secret in ("first", "second"):
        home.keep_operator_key(secret)
        assert home.operator_key() == secret
    assert [file.name for file in tmp_path.iterdir()] == ["operator-key"]
