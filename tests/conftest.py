"""What all tests share: where rows and blobs are kept, which process runs them, and figures at the end of a run."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import hypothesis
import pytest

from tests.scheduling import ByFile, engine_first
from tests.storage import Kind, Place, Servers, environment, local_place

if TYPE_CHECKING:
    from xdist.scheduler import Scheduling

FIGURE: Final = "figure"

hypothesis.settings.register_profile("shared machine", deadline=None)  # a stall is longer than its 200 ms
hypothesis.settings.load_profile("shared machine")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--storage",
        choices=[kind.value for kind in Kind],
        default=Kind.LOCAL.value,
        help="where integration tests keep rows and blobs; the store's own run on both in any case",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """In one process the engine's tests keep their place among the folders."""
    if hasattr(config, "workerinput"):
        engine_first(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> "Scheduling | None":
    return ByFile(config, log) if config.option.dist == "loadfile" else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests told by the fixture `figure`, in whichever process."""
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                for name, told in report.user_properties:
                    if name == FIGURE:
                        terminalreporter.write_line(str(told))


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """PostgreSQL and S3, once for the whole run, started with their first use."""
    servers = Servers()
    yield servers
    servers.close()


@pytest.fixture
def local(tmp_path: Path) -> Place:
    return local_place(tmp_path)


@pytest.fixture
def remote(servers: Servers) -> Iterator[Place]:
    with servers.place(migrated=True) as place:
        yield place


@pytest.fixture
def chosen_storage(request: pytest.FixtureRequest) -> Iterator[None]:
    """With `--storage postgres-s3`: the settings of every gateway that the test starts, if it is not about SQLite."""
    if request.config.getoption("storage") == Kind.LOCAL.value or request.node.get_closest_marker("local"):
        yield
        return
    place: Place = request.getfixturevalue("remote")
    with environment(place.settings):
        yield
