"""The plan's model: its costs are found again in what it did, and more replicas do what they should."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import pytest

from loadtests.fitting import CannotFit, Room, fit, load_of
from loadtests.planning import Model, Traffic, assumptions, extrapolated, plan
from loadtests.points import knee_of, points_of
from loadtests.popularity import shares
from loadtests.recording import ABSENT, TIERS, Run
from loadtests.scenario import Objective, Zipf
from loadtests.simulating import Engine, Load, simulate
from loadtests.sweeping import joined
from tests.unit.loadtests.runs import S, Shape, run_of

ENGINE = Engine(
    step_s=0.02,
    per_sequence_s=0.001,
    per_prompt_token_s=0.0001,
    load_s=0.1,
    activate_s=0.02,
    slots=4,
    host_adapters=6,
    max_num_seqs=16,
)
ROOM = Room(slots=4, host_adapters=6, max_num_seqs=16)


def load(rate: float, duration_s: float = 30.0, adapters: int = 12, seed: int = 1) -> Load:
    """Poisson arrivals of requests with some prompt, some answer and one of the adapters."""
    random = np.random.default_rng(seed)
    at = np.cumsum(random.exponential(1 / rate, int(rate * duration_s)))
    count = len(at)
    adapter, prompts = random.integers(0, adapters, count), random.integers(10, 300, count)
    return Load(at, np.zeros(count), adapter, prompts, random.integers(2, 40, count))


def simulated(engine: Engine, of: Load, replicas: int = 1, duration_s: float = 10.0) -> Run:
    """A run whose samples are what the model does, its phase named after how many they are."""
    answered = simulate(of, engine, replicas=replicas)
    count = len(of.at_s)

    def change(planned: Any, rows: Any) -> None:
        planned["at"] = of.at_s * S
        planned["tenant"], planned["model"] = of.tenant, of.adapter
        planned["prompt_tokens"], planned["output_tokens"] = of.prompt_tokens, of.output_tokens
        rows["scheduled"] = rows["sent"] = planned["at"]
        rows["first"] = answered.first_s * S
        rows["last"] = rows["done"] = answered.done_s * S
        rows["prompt_tokens"], rows["completion_tokens"] = of.prompt_tokens, of.output_tokens
        rows["tier"] = np.where(answered.hit, TIERS.index("gpu"), TIERS.index("cold"))
        rows["replica"] = 1

    shape = Shape((f"of-{count}",), duration_s, count / duration_s, groups={"all": 4}, adapters=12)
    return run_of(shape, change=change)


def test_an_engine_alone_by_hand() -> None:
    """One request at a time: a load, the prompt and a step a token; the second finds its adapter there."""
    two = Load(np.array([0.0, 5.0]), np.zeros(2), np.array([0, 0]), np.array([100, 50]), np.array([3, 1]))
    answered = simulate(two, ENGINE)
    assert answered.first_s == pytest.approx([0.021 + 0.01 + 0.1, 5 + 0.021 + 0.005])
    assert answered.done_s == pytest.approx([0.131 + 2 * 0.021, 5.026])
    assert answered.hit.tolist() == [False, True]


def test_no_more_adapters_run_than_there_are_slots() -> None:
    """The fifth adapter of four slots waits for one that ends, or for its turn: nobody waits for ever."""
    five = Load(np.zeros(5), np.zeros(5), np.arange(5), np.full(5, 10), np.array([100, 100, 100, 20, 5]))
    answered = simulate(five, ENGINE)
    assert answered.first_s[4] > answered.done_s[3]
    busy = Load(
        np.sort(np.tile(np.arange(0, 10, 0.1), 5)),
        np.zeros(500),
        np.tile(np.arange(5), 100),
        np.full(500, 1),
        np.full(500, 4),
    )
    assert np.isfinite(simulate(busy, ENGINE).done_s).all()


def test_the_costs_are_found_again() -> None:
    """From what a run's samples tell, to a tenth; what cost nothing costs nothing."""
    plain = Engine(0.02, 0.001, 0.0001, 0.0, 0.0, 12, 12, 16)
    found = fit(simulated(plain, load(12)), Room(12, 12, 16))
    assert found.engine.step_s == pytest.approx(0.02, rel=0.1)
    assert found.engine.per_sequence_s == pytest.approx(0.001, rel=0.1)
    assert found.engine.per_prompt_token_s == pytest.approx(0.0001, rel=0.1)
    assert found.engine.load_s == 0
    assert found.error < 0.02
    assert 8 < found.most_running <= 16


def test_a_load_costs_what_it_stalls() -> None:
    """Adapters that come in while others decode make them late by their load."""
    found = fit(simulated(ENGINE, load(6, 60)), ROOM)
    assert found.loads > 50
    assert found.engine.step_s == pytest.approx(0.02, rel=0.15)
    assert 0.02 < found.engine.load_s < 0.15


def test_too_little_is_told() -> None:
    """No costs are made up of a run without streams."""

    def whole_at_once(_planned: Any, rows: Any) -> None:
        rows["last"] = rows["first"]

    with pytest.raises(CannotFit, match="fewer than 20"):
        fit(run_of(change=whole_at_once), ROOM)


def test_what_was_sent_is_simulated() -> None:
    """In order of sending, each adapter a number of its own, the base model none."""

    def to_base(planned: Any, _rows: Any) -> None:
        planned["model"][::2] = ABSENT

    told = load_of(run_of(change=to_base))
    assert len(told.at_s) == 200
    assert told.at_s[0] == 0
    assert (np.diff(told.at_s) >= 0).all()
    assert set(told.adapter.tolist()) <= {ABSENT, *range(6)}
    assert np.mean(told.adapter == ABSENT) == 0.5


PHASE_S: Final = 45.0  # in shorter ones chance moves the knee by a tenth


def swept(engine: Engine, rates: Sequence[float], replicas: int = 1) -> Run:
    """A sweep as the model would be measured: a phase of 45 s for each rate, 8 adapters of 4 tenants."""
    runs = []
    for seed, rate in enumerate(rates):
        random = np.random.default_rng(seed)
        at = np.sort(random.uniform(0, PHASE_S, int(PHASE_S * rate)))
        adapter = random.choice(8, len(at), p=shares(Zipf(law="zipf", exponent=1), 8))
        prompts, outputs = random.integers(20, 80, len(at)), random.integers(8, 24, len(at))
        runs.append(simulated(engine, Load(at, adapter % 4, adapter, prompts, outputs), replicas, PHASE_S))
    return joined(runs)


@pytest.fixture(scope="module")
def model() -> Model:
    """Of one replica, swept through its knee."""
    return Model(swept(ENGINE, (4, 8, 12, 14, 16)), ROOM, Objective())


def test_the_model_says_of_what_was_measured_what_was_measured(model: Model) -> None:
    """Its own knee is the measured one, by what it is corrected with, which is little."""
    assert model.measured.reached
    assert model.knee(1) == pytest.approx(model.measured.rate)
    assert model.correction == pytest.approx(1, abs=0.15)


def test_the_knee_of_two_replicas_is_foretold(model: Model) -> None:
    """Within 15 % of the one measured, from a run of one."""
    measured = knee_of(points_of(swept(ENGINE, (30, 36, 42, 48), replicas=2)), 0.9)
    assert measured.reached
    assert model.knee(2) == pytest.approx(measured.rate, rel=0.15)
    assert model.knee(2) > 1.8 * model.knee(1)


def test_a_plan_has_enough_and_no_more(model: Model) -> None:
    """The fewest replicas that keep the goal, and one fewer that does not; what was not measured is marked."""
    made = plan(model, 16.0, goal=0.9, slots=[4])
    few, enough = made.options
    assert few.replicas == enough.replicas - 1
    assert few.kept_share < 0.9 <= enough.kept_share
    assert (few.enough, enough.enough) == (False, True)
    assert f"{enough.replicas} replicas, 1 measured" in enough.extrapolated
    assert few.knee < 16 <= enough.knee
    assert any("Measured knee" in line for line in made.assumptions)


def test_what_was_measured_is_no_extrapolation(model: Model) -> None:
    """The measured replica at a measured rate."""
    assert extrapolated(model, 1, 4, 8.0) == []
    assert extrapolated(model, 1, 8, 8.0) == ["8 slots, 4 measured"]
    assert extrapolated(model, 1, 4, 40.0) == ["40 requests/s a replica, up to 16 measured"]


def test_more_adapters_hit_less(model: Model) -> None:
    """Che's approximation falls with adapters and rises with slots and replicas."""
    many = Model(model.run, ROOM, Objective(), traffic=Traffic(100, Zipf(law="zipf", exponent=0.8)))
    assert many.hit_ratio(1) < many.hit_ratio(1, 16) < many.hit_ratio(4, 16) < 1
    assert many.hit_ratio(1, 100) == 1
    assert "100 adapters, 8 measured" in extrapolated(many, 1, 4, 1.0)


def test_a_run_that_never_kept_the_objective_plans_nothing() -> None:
    """And one that always kept it says that its knee is not known."""
    with pytest.raises(CannotFit, match="At none"):
        Model(swept(ENGINE, (14, 16)), ROOM, Objective(ttft_ms=10))
    easy = Model(swept(ENGINE, (2, 4)), ROOM, Objective(ttft_ms=5_000))
    assert not easy.measured.reached
    assert any("its knee is not known" in line for line in assumptions(easy))
