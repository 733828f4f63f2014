"""A result folder that appears complete or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter_store.disk import sync


class OutputExists(Exception):
    """The place for the result is taken; nothing was written."""

    def __init__(self, out: Path) -> None:
        super().__init__(f"{out} already exists: choose another output folder or remove it first")
        self.out = out


def refuse_taken(out: Path) -> None:
    """Alone, for who would first import torch, for seconds.

    Raises:
        OutputExists: `out` is there.
    """
    if os.path.lexists(out):
        raise OutputExists(out)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that becomes `out` when the block ends well and vanishes if it fails.

    Raises:
        OutputExists: before the block runs if `out` is there, or after it if `out` appeared meanwhile.
    """
    out = out.absolute()
    refuse_taken(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield staging
        staging.chmod(0o755)  # mkdtemp's 0700 and safetensors' 0600 would hide the result from a serving user
        for path in staging.iterdir():
            path.chmod(0o644)
            sync(path)
        sync(staging)
        _rename_to_new(staging, out)
        sync(out.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _rename_to_new(staging: Path, out: Path) -> None:
    try:
        if os.path.lexists(out):  # rename(2) would replace an empty folder without a word
            raise OutputExists(out)
        staging.rename(out)
    except (FileExistsError, NotADirectoryError) as error:
        raise OutputExists(out) from error
    except OSError as error:
        if os.path.lexists(out):  # ENOTEMPTY: another process filled the place first
            raise OutputExists(out) from error
        raise
