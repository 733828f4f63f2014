"""Which process runs which tests, where a run has several (`-n 3 --dist loadfile`)."""

import pytest
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

ENGINE = "tests/e2e"


class ByFile(LoadScopeScheduling):  # type: ignore[misc]  # has no types
    """Each file in one process, in the order of the folders, so that what its tests share is made once.

    Those on the real engine are as one file, and first: there is one engine, and nothing else takes as long.
    """

    def __init__(self, config: pytest.Config, log: Producer | None = None) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # xdist's: the files with the most tests first

    def _split_scope(self, nodeid: str) -> str:
        return ENGINE if nodeid.startswith(ENGINE) else nodeid.partition("::")[0]


def engine_first(items: list[pytest.Item]) -> None:
    """Sorts them so."""
    items.sort(key=lambda item: not item.nodeid.startswith(ENGINE))
