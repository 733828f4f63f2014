"""Requests that come together go through each step together."""

import asyncio
from collections.abc import Callable
from typing import cast

from gateway.batches import PARKED, Batches, Parked, Wait


class Journey:
    def __init__(self, name: str, world: "World") -> None:
        self.name = name
        self.position = 0
        self.due = False
        self.ended = False
        self.error: Exception | None = None
        self._world = world

    def wait_for(self, wait: Wait) -> None:
        async def go_on() -> None:
            await wait
            self._world.batches.go_on([self], self.position)

        self._world.tasks.append(asyncio.ensure_future(go_on()))

    def fail(self, error: Exception) -> None:
        self.error = error
        self.ended = True


class Transport:
    def __init__(self) -> None:
        self.written = b""
        self.closing = False
        self.broken = False

    def write(self, data: bytes) -> None:
        assert not self.closing
        if self.broken:
            raise RuntimeError("after write_eof")
        self.written += data

    def abort(self) -> None:
        self.closing = True

    def is_closing(self) -> bool:
        return self.closing


class World:
    """Two steps and an end; what a step does for somebody can be set."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.answers: dict[str, Callable[[Journey], Wait | Parked | None]] = {}
        self.tasks: list[asyncio.Future[None]] = []
        self.batches: Batches[Journey] = Batches([self._step("one"), self._step("two"), self._end])

    def _step(self, name: str) -> Callable[[Journey], "Wait | Parked | None"]:
        def step(journey: Journey) -> Wait | Parked | None:
            self.told.append(f"{name} {journey.name}")
            answer = self.answers.get(f"{name} {journey.name}")
            return answer(journey) if answer is not None else None

        return step

    def _end(self, journey: Journey) -> None:
        self.told.append(f"end {journey.name}")
        journey.ended = True

    def journey(self, name: str) -> Journey:
        return Journey(name, self)


async def turns(count: int = 3) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def test_each_step_is_taken_by_all_before_the_next() -> None:
    world = World()
    for name in "abc":
        world.batches.add(world.journey(name))
    assert world.told == []  # not before the turn is over
    await turns()
    assert world.told == [f"{step} {name}" for step in ("one", "two", "end") for name in "abc"]


async def test_one_that_fails_or_waits_holds_nobody_up() -> None:
    world = World()
    gate = asyncio.Event()

    def fails(_: Journey) -> None:
        raise ValueError("of a only")

    async def wait() -> None:
        await gate.wait()

    world.answers = {"one a": fails, "one b": lambda _: wait()}
    a, b, c = (world.journey(name) for name in "abc")
    for journey in (a, b, c):
        world.batches.add(journey)
    await turns()
    assert world.told == ["one a", "one b", "one c", "two c", "end c"]
    assert isinstance(a.error, ValueError)
    gate.set()
    await turns()
    assert world.told[-2:] == ["two b", "end b"]
    assert b.error is None


async def test_who_is_parked_goes_on_where_it_stood_once_however_often_it_is_called() -> None:
    world = World()
    world.answers = {"one a": lambda _: PARKED}
    a = world.journey("a")
    world.batches.add(a)
    await turns()
    assert world.told == ["one a"]
    world.batches.add(a)
    world.batches.add(a)
    await turns()
    assert world.told == ["one a", "two a", "end a"]


async def test_a_step_may_be_taken_again() -> None:
    world = World()

    def not_yet(journey: Journey) -> Parked:
        journey.position -= 1
        return PARKED

    world.answers = {"two a": not_yet}
    a = world.journey("a")
    world.batches.add(a)
    await turns()
    del world.answers["two a"]
    world.batches.add(a)
    await turns()
    assert world.told == ["one a", "two a", "two a", "end a"]


async def test_what_was_answered_leaves_before_more_is_begun() -> None:
    world = World()
    old, new = world.journey("old"), world.journey("new")
    old.position = 1
    world.batches.add(new)
    world.batches.add(old)
    await turns()
    assert world.told == ["two old", "end old", "one new", "two new", "end new"]


async def test_who_has_ended_meanwhile_goes_nowhere() -> None:
    world = World()
    gone = world.journey("gone")
    world.batches.add(gone)
    gone.ended = True
    await turns()
    assert world.told == []


async def test_writes_wait_for_the_steps_and_keep_their_order() -> None:
    world = World()
    near, closed = Transport(), Transport()
    done: list[bytes] = []

    def write(_: Journey) -> None:
        world.batches.write(cast(asyncio.WriteTransport, near), b"1")
        world.batches.write(cast(asyncio.WriteTransport, closed), b"lost")
        world.batches.write(cast(asyncio.WriteTransport, near), b"2")
        world.batches.after(lambda: done.append(near.written))
        closed.closing = True
        assert near.written == b""

    world.answers = {"two a": write}
    world.batches.add(world.journey("a"))
    await turns()
    assert near.written == b"12"
    assert closed.written == b""  # its client has gone in the same turn
    assert done == [b"12"]


async def test_a_write_from_outside_needs_no_journey() -> None:
    world = World()
    transport = Transport()
    world.batches.write(cast(asyncio.WriteTransport, transport), b"event")
    await turns()
    assert transport.written == b"event"


async def test_a_transport_that_cannot_be_written_to_costs_no_other_anything() -> None:
    world = World()
    broken, sound = Transport(), Transport()
    broken.broken = True
    ended: list[str] = []

    def cannot() -> None:
        raise RuntimeError("not ended")

    for transport in (broken, sound):
        world.batches.write(cast(asyncio.WriteTransport, transport), b"event")
    world.batches.after(cannot)
    world.batches.after(lambda: ended.append("sound"))
    await turns()
    assert broken.closing
    assert sound.written == b"event"
    assert ended == ["sound"]


async def test_one_that_cannot_even_fail_takes_nobody_along() -> None:
    world = World()

    def fails(_: Journey) -> None:
        raise ValueError

    class Stubborn(Journey):
        def fail(self, error: Exception) -> None:
            raise RuntimeError

    world.answers = {"one a": fails}
    world.batches.add(Stubborn("a", world))
    world.batches.add(world.journey("b"))
    await turns()
    assert world.told == ["one a", "one b", "two b", "end b"]


async def test_work_that_comes_during_a_run_is_not_forgotten() -> None:
    world = World()
    second = world.journey("second")

    def brings(_: Journey) -> None:
        world.batches.add(second)

    world.answers = {"two first": brings}
    world.batches.add(world.journey("first"))
    await turns()
    assert world.told[-1] == "end second"
