"""Every gate of a shipped scenario can be red: a server or a setting that is broken for it, and no other gate fails."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from loadtests import gates
from loadtests.fake_stack import fake_stack
from loadtests.running import Options, run
from loadtests.scenario import Scenario, read


@dataclass(frozen=True)
class Broken:
    """What is done to a scenario or its server, and the gate that must see it."""

    scenario: str
    metric: str
    more: Sequence[str] = ()  # of the replica
    stack: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)  # of all tenants
    told: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.scenario} {self.metric}"

    def read(self) -> Scenario:
        told = read(Path(self.scenario), profile="short").model_dump(mode="json") | dict(self.told)
        told["stack"] |= self.stack
        for group in told["tenants"] if self.plan else ():
            group["plan"] = dict(self.plan)
        return Scenario.model_validate(told)


BREAKS: Final = ("--break-every", "25")
IS_FULL: Final = ("--break-every", "25", "--break-with", "429")
MIXES_UP: Final = ("--mix-up-every", "7")
BURSTIER: Final = [
    {"name": name, "duration_s": 8, "load": [{"tenants": "all", "workload": "chat", "arrivals": {"rate": 12, **law}}]}
    for name, law in (("even", {"law": "poisson"}), ("bursts", {"law": "gamma", "cv": 4}))
]
BROKEN: Final = (
    Broken("smoke", "error_share", BREAKS),
    Broken("smoke", "refused_share", IS_FULL),
    Broken("smoke", "wrong_adapter", MIXES_UP),
    Broken("smoke", "goodput_share", stack={"slots": 1, "activate_ms": 200}),
    Broken("burst", "error_share", BREAKS),
    Broken("burst", "refused_share", IS_FULL),
    Broken("burst", "wrong_adapter", MIXES_UP),
    Broken(
        "burst", "ttft_ms.p95", stack={"max_num_seqs": 4}, told={"phases": BURSTIER, "objective": {"ttft_ms": 5_000}}
    ),
    Broken("burst", "goodput_share", stack={"max_num_seqs": 2, "step_ms": 20}),
    Broken("cold-start-storm", "error_share", BREAKS),
    Broken("cold-start-storm", "refused_share", IS_FULL),
    Broken("cold-start-storm", "wrong_adapter", MIXES_UP),
    Broken(
        "cold-start-storm",
        "hit_ratio",
        stack={"slots": 32, "host_adapters": 32},
        told={"answers_learned": "before"},
    ),
    Broken(
        "cold-start-storm",
        "ttft_ms.max",
        stack={"load_ms": 1_100, "settings": {"TAILOR_QUEUE_TIMEOUT_S": "60"}},
    ),
)


@pytest.mark.full
@pytest.mark.parametrize("broken", BROKEN, ids=str)
async def test_this_gate_alone_is_red(broken: Broken, tmp_path: Path) -> None:
    """Exit code 1, and what the others hold is told as kept."""
    scenario = broken.read()
    async with fake_stack(scenario.stack, tmp_path / "stack", more=broken.more) as stack:
        found = await run(scenario, stack, Options(tmp_path))
    verdicts = gates.judge(found)
    told = [f"{one.judgement} {one.gate}: {one.reason}" for one in verdicts]
    assert gates.exit_code(verdicts, found) == gates.FAILED, told
    assert [one.metric for one in verdicts if one.judgement != gates.Judgement.PASS] == [broken.metric], told
