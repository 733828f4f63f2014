"""When a scenario's actions are due, and to whom each is done."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from loadtests.scenario import Action, ActionKind, Scenario
from loadtests.tenants import Adapter, Tenant

NS: Final = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Occurrence:
    """An action's turn."""

    at_ns: int  # since the run's begin
    action: Action
    number: int  # how often it was done before

    def adapter_of(self, tenant: Tenant, tenants: int) -> Adapter:
        """The tenant's adapters in turn; those that are deleted from the last one on, which is asked least."""
        turn = self.number // tenants % len(tenant.adapters)
        return tenant.adapters[-1 - turn if self.action.kind is ActionKind.DELETE else turn]


def occurrences(scenario: Scenario) -> list[Occurrence]:
    """Every action at every time that it is due, in order."""
    found, begin_s = [], 0.0
    for phase in scenario.phases:
        for action in phase.actions:
            found += [
                Occurrence(round((begin_s + at_s) * NS), action, number)
                for number, at_s in enumerate(_times(action, phase.duration_s))
            ]
        begin_s += phase.duration_s + phase.settle_s
    return sorted(found, key=lambda one: one.at_ns)


def _times(action: Action, duration_s: float) -> Iterator[float]:
    at_s = action.at_s
    while at_s < duration_s:
        yield at_s
        if action.every_s is None:
            return
        at_s += action.every_s


def tenants_of(action: Action, tenants: Sequence[Tenant]) -> list[Tenant]:
    """Whom it is about: a group, or all."""
    return [one for one in tenants if action.tenants in (None, one.group.name)]
