"""What the agent keeps of requests whose answers never say what they used."""

import asyncio
from dataclasses import dataclass

from adapter_store.agent.counts import KEPT_S, MOST_KEPT, Counts, Use


@dataclass
class Sequence:
    """An answer in the making."""

    prompt_tokens: int = 7
    cached_tokens: int = 0
    completion_tokens: int = 0
    is_over: bool = False


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_each_request_gets_what_its_own_tasks_have_begun() -> None:
    """Also where vLLM begins it in a task of its own; what runs beside, and the agent's own probes, are not its."""
    counts = Counts()

    async def serve(name: str, *sequences: Sequence) -> None:
        with counts.counting(name):
            for sequence in sequences:
                await asyncio.create_task(begin(sequence))
                await asyncio.sleep(0)

    async def begin(sequence: Sequence) -> None:
        counts.began(sequence)

    counts.began(Sequence(is_over=True))
    await asyncio.gather(
        serve("a", Sequence(7, 2, 3, is_over=True), Sequence(7, 4, 5, is_over=True)),
        serve("b", Sequence(9, 0, 1, is_over=True)),
        serve("c"),
    )
    assert counts.use_of("a") == Use(7, 4, 8)  # one prompt, two answers
    assert counts.use_of("b") == Use(9, 0, 1)
    assert (counts.use_of("c"), counts.is_running("c")) == (None, False)  # it never came to the engine


def test_a_request_runs_until_its_engine_has_stopped() -> None:
    """Its server may be done with it before: what comes then is in the count."""
    counts, sequence = Counts(), Sequence()
    with counts.counting("a"):
        counts.began(sequence)
        assert (counts.use_of("a"), counts.is_running("a")) == (None, True)
    sequence.completion_tokens = 5
    assert (counts.use_of("a"), counts.is_running("a")) == (None, True)
    sequence.completion_tokens, sequence.is_over = 6, True
    assert (counts.use_of("a"), counts.is_running("a")) == (Use(7, 0, 6), False)
    sequence.completion_tokens = 9  # it is held no longer
    assert counts.use_of("a") == Use(7, 0, 6)


def test_counts_are_forgotten() -> None:
    """After a while, and the oldest where they are many."""
    clock = Clock()
    counts = Counts(clock=clock)

    def serve(name: str) -> None:
        with counts.counting(name):
            counts.began(Sequence(is_over=True))

    serve("first")
    clock.now = KEPT_S
    serve("second")
    assert counts.use_of("first") is None
    for number in range(MOST_KEPT - 1):
        serve(f"{number}")
    assert counts.use_of("second") is not None
    serve("one more")
    assert counts.use_of("second") is None
    assert counts.use_of("0") is not None
