"""When a scenario's actions are due, whom they are done to, and what is refused before a run."""

from typing import Any

import pytest
from pydantic import ValidationError

from loadtests.actions import check
from loadtests.occurrences import NS, occurrences
from loadtests.scenario import Scenario, ScenarioInvalid
from loadtests.stacks import UrlTarget
from loadtests.tenants import Adapter, Tenant


def scenario(*actions: dict[str, Any], adapters: int = 3) -> Scenario:
    return Scenario.model_validate(
        {
            "name": "test",
            "question": "Does this test go right?",
            "tenants": [{"name": "all", "count": 2, "adapters": adapters}, {"name": "bare", "adapters": 0}],
            "workloads": {"chat": {}},
            "phases": [
                {"name": "calm", "duration_s": 2, "settle_s": 1},
                {"name": "busy", "duration_s": 4, "actions": actions},
            ],
            "gates": [{"metric": "error_share", "at_most": 0}],
        }
    )


def test_actions_are_due_on_the_clock_of_their_phase() -> None:
    """Again and again where they are to be, until the phase ends, and all in order."""
    due = occurrences(scenario({"kind": "publish", "at_s": 1, "every_s": 1}, {"kind": "rotate-key", "at_s": 1.5}))
    assert [(one.at_ns / NS, str(one.action.kind), one.number) for one in due] == [
        (4, "publish", 0),
        (4.5, "rotate-key", 0),
        (5, "publish", 1),
        (6, "publish", 2),
    ]


def test_a_tenants_adapters_are_acted_on_in_turn() -> None:
    """All tenants' first ones, then their second ones; what is deleted goes from the end."""
    wanted = scenario({"kind": "publish", "at_s": 0, "every_s": 0.5}, {"kind": "delete", "at_s": 0.1, "every_s": 2})
    group = wanted.tenants[0]
    tenant = Tenant(0, "all-0", group, "", "", "", [Adapter("all-0", f"adapter-{number}") for number in range(3)])
    names = {"publish": [], "delete": []}  # type: dict[str, list[str]]
    for one in occurrences(wanted):
        names[one.action.kind].append(one.adapter_of(tenant, 2).name[-1])
    assert names == {"publish": list("00112200"), "delete": list("22")}


@pytest.mark.parametrize(
    ("action", "fault"),
    [
        ({"kind": "kill-replica", "at_s": 0}, "kill-replica cannot be done to a target of kind url"),
        ({"kind": "publish", "at_s": 0}, "asks for tenants that all have adapters"),
        ({"kind": "publish", "at_s": 0, "tenants": "nobody"}, "no tenants nobody"),
        ({"kind": "command", "at_s": 0}, "a `command`"),
    ],
)
def test_what_cannot_be_done_is_told_before_the_run(action: dict[str, Any], fault: str) -> None:
    """Not in the middle of it."""
    with pytest.raises(ScenarioInvalid, match=fault):
        check(scenario(action), UrlTarget("http://127.0.0.1:1", "key"))


def test_an_action_after_its_phase_is_refused() -> None:
    """It would never be done, and nobody would know."""
    with pytest.raises(ValidationError, match="busy: rotate-key at 4 s is after its end"):
        scenario({"kind": "rotate-key", "at_s": 4})
