"""Pure: whom a weighted alias gives which version, and when a rollout goes back."""

from collections import Counter
from dataclasses import replace

import pytest

from adapter_store.aliases import Share, Split
from adapter_store.catalog import Provenance, Version
from adapter_store.errors import RolloutInvalid
from adapter_store.ids import AdapterId, TenantId, VersionId
from adapter_store.rollouts import Policy, Tally, judge

VERSION = Version(
    id=VersionId("ver_1"),
    adapter_id=AdapterId("adp_1"),
    tenant_id=TenantId("ten_a"),
    adapter_name="bot",
    number=1,
    digest="0" * 64,
    file_hashes=bytes(64),
    config_bytes=1,
    weights_bytes=1,
    rank=8,
    modules=("q_proj",),
    base_fingerprint="f",
    provenance=Provenance.UPLOAD,
    created_at=0,
)
SECOND = replace(VERSION, id=VersionId("ver_2"), number=2)
THIRD = replace(VERSION, id=VersionId("ver_3"), number=3)
USERS = [f"user-{number}".encode() for number in range(20_000)]


def split(*weights: tuple[Version, int]) -> Split:
    return Split(tuple(Share(version, weight) for version, weight in weights))


def test_versions_are_given_in_proportion_to_their_weights() -> None:
    """Within four standard deviations of 20,000 draws."""
    given = Counter(split((VERSION, 70), (SECOND, 25), (THIRD, 5)).pick(user).number for user in USERS)
    for number, share in ((1, 0.70), (2, 0.25), (3, 0.05)):
        spread = (share * (1 - share) * len(USERS)) ** 0.5
        assert abs(given[number] - share * len(USERS)) < 4 * spread


def test_who_has_a_growing_canary_keeps_it() -> None:
    """From 5 to 25 to 100 per cent nobody goes back to the old version."""
    steps = [split((VERSION, 100 - percent), (SECOND, percent)) for percent in (5, 25, 50)]
    had: set[bytes] = set()
    for step in steps:
        have = {user for user in USERS if step.pick(user) is SECOND}
        assert had < have
        had = have
    assert all(steps[0].pick(user) is steps[0].pick(user) for user in USERS[:100])


def tally(requests: int, errors: int = 0, latency_s: float | None = None) -> Tally:
    found = Tally()
    for number in range(requests):
        found.note(failed=number < errors, latency_s=latency_s)
    return found


@pytest.mark.parametrize(
    ("candidate", "baseline", "goes_back"),
    [
        (tally(0), tally(0), False),
        (tally(2, 2), tally(0), False),  # two may be bad luck
        (tally(3, 3), tally(100), True),
        (tally(300, 3), tally(300), False),
        (tally(300, 30), tally(300), True),
        (tally(300, 30), tally(300, 30), False),  # the engine fails for both
        (tally(300, 90), tally(300, 30), True),
        (tally(100, latency_s=0.3), tally(100, latency_s=0.1), True),
        (tally(100, latency_s=0.15), tally(100, latency_s=0.1), False),
        (tally(29, latency_s=9), tally(100, latency_s=0.1), False),  # too few to tell
        (tally(100, latency_s=0.012), tally(100, latency_s=0.001), False),  # 11 ms are noise
        (tally(100, latency_s=9), tally(0), False),  # nothing to compare with
    ],
)
def test_a_version_that_does_worse_than_the_one_before_goes_back(
    candidate: Tally, baseline: Tally, goes_back: bool
) -> None:
    """By its errors or its latency, and not by chance or for everybody's trouble."""
    reason = judge(candidate, baseline, Policy())
    assert (reason is not None) == goes_back, reason


def test_counts_of_several_gateways_add_up() -> None:
    """What is written down reads back the same."""
    one, two = tally(40, 1, 0.1), tally(60, 2, 1.0)
    both = Tally.decoded(one.encoded())
    both.add(Tally.decoded(two.encoded()))
    assert (both.requests, both.errors, sum(both.latencies)) == (100, 3, 97)
    slow = both.latency_s(0.9)
    assert slow is not None
    assert 1.0 < slow < 1.2
    low = both.latency_s(0.3)
    assert low is not None
    assert 0.1 < low < 0.12


@pytest.mark.parametrize("steps", [(), (5, 25), (25, 5, 100), (0, 100), (5, 5, 100), (5, 101)])
def test_steps_lead_to_the_whole(steps: tuple[int, ...]) -> None:
    """Anything else is refused."""
    with pytest.raises(RolloutInvalid, match="per cent"):
        Policy(steps=steps)
