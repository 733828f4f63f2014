"""What a scenario's YAML may say, checked whole before anything is sent.

A scenario asks one question of a server: who calls (tenants), how long and how hard (phases), with what (workloads),
what happens meanwhile (actions), and what must hold (gates). Times are seconds from the begin of their phase.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from loadtests import metrics

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
SHIPPED: Final = Path(__file__).parent / "scenarios"


class ScenarioInvalid(Exception):
    """A scenario that cannot be run; the text names every fault with its place."""


class Part(BaseModel):
    """A piece of a scenario: unknown members are faults, and nothing changes after it was read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# arrivals


class Constant(Part):
    """One request every 1/rate seconds."""

    law: Literal["constant"]
    rate: Positive = Field(description="requests per second")


class Poisson(Part):
    """Independent arrivals: exponential gaps."""

    law: Literal["poisson"]
    rate: Positive


class Gamma(Part):
    """Gamma gaps: `cv` above 1 comes in bursts, 1 is Poisson, below it is more even."""

    law: Literal["gamma"]
    rate: Positive
    cv: Positive = Field(description="standard deviation of the gaps over their mean")


class Steps(Part):
    """Poisson arrivals whose rate goes from step to step, each equally long."""

    law: Literal["steps"]
    rates: tuple[Positive, ...] = Field(min_length=2)


class Ramp(Part):
    """Poisson arrivals whose rate goes in a straight line from `from_rate` to `to_rate` over the phase."""

    law: Literal["ramp"]
    from_rate: Annotated[float, Field(ge=0)]
    to_rate: Positive


class Diurnal(Part):
    """Poisson arrivals whose rate goes as a day's: a sine around `mean_rate` with one period of `period_s`."""

    law: Literal["diurnal"]
    mean_rate: Positive
    swing: Share = Field(0.5, description="the amplitude over the mean")
    period_s: Positive


class Trace(Part):
    """The recorded times of a trace file (`tailor loadtest trace import` writes them), as they are or faster."""

    law: Literal["trace"]
    file: Path = Field(description="JSONL; a path is relative to the scenario's folder")
    speed: Positive = 1.0

    @field_validator("file")
    @classmethod
    def _beside_the_scenario(cls, value: Path, info: ValidationInfo) -> Path:
        folder: Path = (info.context or {}).get("folder", Path())
        return folder / value


class Closed(Part):
    """A closed loop: so many callers, each of which waits for its answer before it asks again.

    Such a load slows down with the server and so hides its waiting; use it only where callers really wait.
    """

    law: Literal["closed"]
    callers: Annotated[int, Field(ge=1)]


Arrivals = Annotated[Constant | Poisson | Gamma | Steps | Ramp | Diurnal | Trace | Closed, Field(discriminator="law")]

# workloads


class Fixed(Part):
    """Always `value`."""

    law: Literal["fixed"]
    value: Annotated[int, Field(ge=0)]


class Lognormal(Part):
    """Lognormal lengths, cut at `least` and `most`."""

    law: Literal["lognormal"]
    median: Positive
    sigma: Positive
    least: Annotated[int, Field(ge=1)] = 1
    most: Annotated[int, Field(ge=1)]


class OfTrace(Part):
    """The lengths that stand beside the times in the phase's trace."""

    law: Literal["trace"]


Length = Annotated[Fixed | Lognormal | OfTrace, Field(discriminator="law")]


class Zipf(Part):
    """The k-th most popular adapter is asked in proportion to 1/k^exponent."""

    law: Literal["zipf"]
    exponent: Annotated[float, Field(ge=0)]


class Uniform(Part):
    """Every adapter equally often."""

    law: Literal["uniform"]


class Distinct(Part):
    """Adapters in turn: the next request asks another one."""

    law: Literal["distinct"]


class Identical(Part):
    """All ask one adapter."""

    law: Literal["identical"]


class PowerLaw(Part):
    """S-LoRA's power law (Sheng et al. 2023, §7): adapter i of n has the share of (i/n)^(1/alpha) that is new at i.

    A small alpha gives nearly all requests to the last ones; alpha = 1 is uniform. Not the exponent of a Zipf law.
    """

    law: Literal["power"]
    alpha: Positive


Popularity = Annotated[Zipf | Uniform | Distinct | Identical | PowerLaw, Field(discriminator="law")]


class Parameters(Part):
    """Request fields that a share of the requests has, such as `temperature` or `stop`."""

    share: Share
    fields: dict[str, Any]


class Conversation(Part):
    """Several turns of one user; each turn has the earlier ones in front of it, as a transcript fixed beforehand.

    The load's arrivals are the begins of conversations, so that its requests are as many times more as there are turns.
    """

    turns: Length
    think_s: Positive = Field(description="mean time between a turn's begin and the next's; exponential")


class Workload(Part):
    """What is asked."""

    route: Literal["chat", "completions"] = "chat"
    stream: bool = True
    prompt_tokens: Length = Field(
        Fixed(law="fixed", value=32), description="of the prompt itself: shared prefix and earlier turns come before it"
    )
    output_tokens: Length = Fixed(law="fixed", value=16)
    popularity: Popularity = Uniform(law="uniform")
    drift_every_s: Positive | None = Field(None, description="every so often the order of popularity moves by one")
    base_share: Share = Field(0.0, description="requests that ask the base model, no adapter")
    shared_prefix_tokens: Annotated[int, Field(ge=0)] = Field(0, description="what all prompts of a tenant begin with")
    conversation: Conversation | None = None
    abort_share: Share = Field(0.0, description="requests whose client leaves")
    abort_after_s: Positive = Field(0.2, description="mean time until it does, from sending; exponential")
    parameters: tuple[Parameters, ...] = Field((), description="at most one of them a request")
    canary_share: Share = Field(0.1, description="requests with the fixed prompt whose answer is known beforehand")

    @model_validator(mode="after")
    def _shares_are_of_a_whole(self) -> Self:
        if sum(one.share for one in self.parameters) > 1:
            raise ValueError("the shares of parameters are more than 1 together")
        return self


# tenants


class Tenants(Part):
    """A group of alike tenants, each with its own key and its own adapters: `name-0`, `name-1`, …"""

    name: Name
    count: Annotated[int, Field(ge=1, le=10_000)] = 1
    adapters: Annotated[int, Field(ge=0, le=10_000)] = Field(1, description="of each tenant")
    rank: Annotated[int, Field(ge=1, le=64)] = 8
    plan: dict[str, Any] = Field(default_factory=dict, description="the plan's members as in `/admin/v1/plans`")


# actions


class ActionKind(StrEnum):
    """What happens to the server."""

    UPLOAD = "upload"  # a new version of an adapter, not published
    PUBLISH = "publish"  # a new version of an adapter, published
    FLIP = "flip"  # the alias moves to the adapter's version before
    DELETE = "delete"  # an adapter goes; requests to it may answer 404 from then on
    ROTATE_KEY = "rotate-key"
    KILL_REPLICA = "kill-replica"
    STOP_REPLICA = "stop-replica"  # SIGSTOP for `duration_s`
    SLOW_REPLICA = "slow-replica"  # the fake's engine takes `factor` times as long for `duration_s`
    ROLLING_RESTART = "rolling-restart"
    TRAIN = "train"  # a fine-tuning job begins
    COMMAND = "command"  # a command of the operator's own


class Action(Part):
    """One event on the clock of its phase."""

    kind: ActionKind
    at_s: Annotated[float, Field(ge=0)]
    every_s: Positive | None = Field(None, description="again and again until the phase ends")
    tenants: Name | None = Field(None, description="the group whose tenants it is about, in turn")
    replica: Annotated[int, Field(ge=0)] = 0
    duration_s: Positive = 1.0
    factor: Positive = 4.0
    command: tuple[str, ...] = ()


# phases


class Load(Part):
    """One group's requests in a phase. The rate is that of the whole group, shared among its tenants by popularity.

    Popularity ranks all adapters of the group, its tenants in turn; with `uniform` all tenants get the same.
    """

    tenants: Name
    workload: Name
    arrivals: Arrivals


class Phase(Part):
    """A stretch of time with the same load."""

    name: Name
    duration_s: Positive
    load: tuple[Load, ...] = ()
    actions: tuple[Action, ...] = ()
    measured: bool = Field(True, description="a warm-up is not: gates and figures leave it out")
    settle_s: Annotated[float, Field(ge=0)] = Field(0.0, description="silence after it")

    @model_validator(mode="after")
    def _actions_are_within(self) -> Self:
        for action in self.actions:
            if action.at_s >= self.duration_s:
                raise ValueError(f"{self.name}: {action.kind} at {action.at_s:g} s is after its end")
        return self


# gates


class Gate(Part):
    """A bound that one figure must keep.

    `metric` is a name of `loadtests.metrics`, such as `ttft_ms.p99`, `error_share`, `wrong_adapter`, `fairness.jain`.
    With `ratio_to_phase` or `ratio_to_tenants` the value is the ratio to the same figure there, with
    `ratio_to_baseline` to that of an earlier run (`--baseline`), judged by a bootstrap interval.
    """

    metric: str
    phase: Name | None = Field(None, description="default: all that are measured")
    tenants: Name | None = None
    ratio_to_phase: Name | None = None
    ratio_to_tenants: Name | None = None
    ratio_to_baseline: bool = False
    at_most: float | None = None
    at_least: float | None = None
    samples: Annotated[int, Field(ge=0)] = Field(20, description="fewer and the gate is inconclusive")

    @model_validator(mode="after")
    def _is_bound(self) -> Self:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("a gate has either at_most or at_least")
        if self.ratio_to_baseline and (self.ratio_to_phase or self.ratio_to_tenants):
            raise ValueError("a gate is a ratio to one thing: the baseline, or a phase or tenants of the same run")
        if fault := metrics.fault(self.metric):
            raise ValueError(fault)
        return self


class Objective(Part):
    """What a request has to keep to count into goodput; all that are said. Times from when it was scheduled."""

    ttft_ms: Positive | None = 1_000.0
    tpot_ms: Positive | None = Field(None, description="mean time between output tokens")
    response_ms: Positive | None = None


class StackSettings(Part):
    """The server that `--stack` starts. What is about the fake's engine is ignored by a real one."""

    replicas: Annotated[int, Field(ge=1, le=16)] = 1
    slots: Annotated[int, Field(ge=1)] = Field(4, description="max_loras")
    host_adapters: Annotated[int, Field(ge=1)] = Field(16, description="max_cpu_loras")
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    max_model_len: Annotated[int, Field(ge=1)] = 2_048
    step_ms: Positive = 10.0
    per_sequence_us: Annotated[float, Field(ge=0)] = 100.0
    per_prompt_token_us: Annotated[float, Field(ge=0)] = 20.0
    load_ms: Annotated[float, Field(ge=0)] = Field(50.0, description="an adapter from the disk, for everybody")
    activate_ms: Annotated[float, Field(ge=0)] = Field(5.0, description="the same from host memory into a slot")
    worker: bool = Field(False, description="a training worker beside it")
    settings: dict[str, str] = Field(default_factory=dict, description="TAILOR_* of the gateway")


class Scenario(Part):
    """A whole scenario."""

    name: Name
    question: str = Field(min_length=10, description="what its result answers")
    seed: int = 1
    stack: StackSettings = StackSettings()
    tenants: tuple[Tenants, ...] = Field(min_length=1)
    workloads: dict[Name, Workload] = Field(min_length=1)
    phases: tuple[Phase, ...] = Field(min_length=1)
    gates: tuple[Gate, ...] = Field(min_length=1)
    objective: Objective = Objective()
    late_ms: Positive = Field(25.0, description="a phase that is sent later than this at p99 proves nothing")
    timeout_s: Positive = Field(60.0, description="of one request, from sending")
    answers_learned: Literal["before", "after"] = Field(
        "before", description="when adapters are asked for the canaries' answers; `after` leaves them cold"
    )

    @model_validator(mode="after")
    def _names_are_known(self) -> Self:
        groups, phases = {group.name for group in self.tenants}, {phase.name for phase in self.phases}
        names = [group.name for group in self.tenants], [phase.name for phase in self.phases]
        faults = [
            *(f"{name}: the name of two" for each in names for name in sorted(set(each)) if each.count(name) > 1),
            *(
                f"{load.tenants}: no such tenants"
                for phase in self.phases
                for load in phase.load
                if load.tenants not in groups
            ),
            *(
                f"{load.workload}: no such workload"
                for phase in self.phases
                for load in phase.load
                if load.workload not in self.workloads
            ),
            *(
                f"{name}: no such {kind}"
                for gate in self.gates
                for name, known, kind in (
                    (gate.phase, phases, "phase"),
                    (gate.ratio_to_phase, phases, "phase"),
                    (gate.tenants, groups, "tenants"),
                    (gate.ratio_to_tenants, groups, "tenants"),
                )
                if name is not None and name not in known
            ),
        ]
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @model_validator(mode="after")
    def _loads_can_be_drawn(self) -> Self:
        for load in (load for phase in self.phases for load in phase.load):
            work, law = self.workloads[load.workload], load.arrivals.law
            of_trace = isinstance(work.prompt_tokens, OfTrace) or isinstance(work.output_tokens, OfTrace)
            if of_trace and law != "trace":
                raise ValueError(f"{load.workload}: lengths of a trace need arrivals of a trace, not {law}")
            if work.conversation is not None and (of_trace or law == "closed"):
                raise ValueError(f"{load.workload}: a conversation is for open loops, with lengths of its own")
        return self


def read(path: Path, *, profile: str = "full") -> Scenario:
    """The scenario of a file, or a shipped one by its name, in one of its profiles.

    A file's member `profiles` maps a profile's name to what it has otherwise, merged into the rest (lists whole).

    Raises:
        ScenarioInvalid: it cannot be read or is not as said above; all faults are told.
    """
    found = path if path.suffix in (".yaml", ".yml") else SHIPPED / f"{path}.yaml"
    try:
        told = yaml.safe_load(found.read_text())
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        shipped = ", ".join(sorted(one.stem for one in SHIPPED.glob("*.yaml")))
        raise ScenarioInvalid(f"{found}: {error}. A scenario is a YAML file or one of {shipped}.") from error
    if not isinstance(told, dict):
        raise ScenarioInvalid(f"{found}: a scenario is a mapping.")
    profiles = told.pop("profiles", {})
    if profile != "full" and profile not in profiles:
        raise ScenarioInvalid(f"{found}: no profile {profile!r}; it has full, {', '.join(profiles)}.")
    try:
        whole = _merged(told, profiles.get(profile, {}))
        return Scenario.model_validate(whole, context={"folder": found.parent.absolute()})
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, one['loc'])) or 'scenario'}: {one['msg']}" for one in error.errors()]
        raise ScenarioInvalid(f"{found}: " + "; ".join(faults)) from error


def _merged(told: dict[str, Any], otherwise: dict[str, Any]) -> dict[str, Any]:
    merged = dict(told)
    for name, value in otherwise.items():
        known = merged.get(name)
        merged[name] = _merged(known, value) if isinstance(known, dict) and isinstance(value, dict) else value
    return merged
