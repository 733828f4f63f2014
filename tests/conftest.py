"""What all tests share: where rows and blobs are kept."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage import Kind, Place, Servers, environment, local_place


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--storage",
        choices=[kind.value for kind in Kind],
        default=Kind.LOCAL.value,
        help="where integration tests keep rows and blobs; the store's own run on both in any case",
    )


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
