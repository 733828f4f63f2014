"""Every shipped scenario, run in their short form against a real gateway in front of fake replicas."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml

from loadtests import gates
from loadtests.running import Options, run
from loadtests.scenario import SHIPPED, read
from loadtests.scheduling import schedule_of
from tests.integration.loadtests.chances import judged
from tests.integration.loadtests.stacks import Stacks, shared_stacks
from tests.small_base import SMALL

NAMES = sorted(path.stem for path in SHIPPED.glob("*.yaml"))


@pytest.fixture(scope="module")
async def stacks(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stacks]:
    async with shared_stacks(tmp_path_factory.mktemp("stacks")) as stacks:
        yield stacks


@pytest.mark.parametrize("name", NAMES)
async def test_a_scenario_is_green(
    name: str, stacks: Stacks, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Its short profile keeps all its gates, and nothing about the run is in doubt; a stalled one is played again."""
    scenario = read(Path(name), profile="short")
    base = trainable(tmp_path_factory.mktemp("bases")) if scenario.stack.worker else None
    stack = await stacks.stack(scenario.stack, base=base)
    code, verdicts = await judged(lambda folder: run(scenario, stack, Options(folder)), tmp_path)
    assert code == gates.PASSED, verdicts


@pytest.mark.parametrize("name", NAMES)
def test_a_scenario_says_what_can_be_sent(name: str) -> None:
    """In each of its profiles: requests of every phase that is measured."""
    profiles = yaml.safe_load((SHIPPED / f"{name}.yaml").read_text()).get("profiles", {})
    assert "short" in profiles
    for profile in profiles:
        scenario = read(Path(name), profile=profile)
        planned = schedule_of(scenario).planned
        measured = {number for number, phase in enumerate(scenario.phases) if phase.measured and phase.load}
        assert measured <= set(planned["phase"]), profile


def trainable(folder: Path) -> Path:
    """A base with weights that a worker can train on."""
    from training import tiny_base

    return tiny_base.build(folder / "base", recipe=SMALL).path
