"""The gateway of the integration tests, clients that mend nothing, and the figures that were seen."""

from collections.abc import AsyncIterator, Callable

import pytest

from tests.chaos.client import Client
from tests.conftest import FIGURE
from tests.integration.gateway.conftest import base, base_folder, run_gateway, run_replica

__all__ = ["base", "base_folder", "run_gateway", "run_replica"]

NewClient = Callable[[str], Client]
Figure = Callable[[str], None]


@pytest.fixture
async def new_client() -> AsyncIterator[NewClient]:
    """Makes clients; none outlives the test."""
    made: list[Client] = []

    def new(url: str) -> Client:
        made.append(Client(url))
        return made[-1]

    yield new
    for client in made:
        client.leave()


@pytest.fixture
def figure(request: pytest.FixtureRequest) -> Figure:
    """Shows a figure at the end of the run, whether it was within its bound or not."""
    told = request.node.user_properties  # these come from the process that ran the test, too
    return lambda line: told.append((FIGURE, line))
