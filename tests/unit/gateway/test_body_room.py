"""Bodies on their way: how many of a tenant's are read at once."""

import asyncio

import pytest

from adapter_store.ids import TenantId
from gateway.body_room import BodyRoom
from gateway.errors import RateLimited

ACME, GLOBEX = TenantId("acme"), TenantId("globex")


async def waiting(room: BodyRoom, size: int, tenant: TenantId = ACME) -> "asyncio.Task[None]":
    task = asyncio.create_task(room.enter(tenant, size))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return task


async def test_bodies_beyond_the_room_wait_in_line() -> None:
    """The first in line is the next, also before a smaller one that there would be room for; tenants wait for none."""
    room = BodyRoom(10)
    await room.enter(ACME, 6)
    large, small = await waiting(room, 8), await waiting(room, 1)
    await room.enter(GLOBEX, 10)
    assert not large.done()
    assert not small.done()
    room.leave(ACME, 6)
    await asyncio.gather(large, small)
    assert room.held(ACME) == 9


async def test_a_body_larger_than_the_room_is_read_alone() -> None:
    """Else it would never be."""
    room = BodyRoom(10)
    await room.enter(ACME, 20)
    other = await waiting(room, 1)
    assert not other.done()
    room.leave(ACME, 20)
    await other


async def test_who_waits_too_long_or_behind_too_many_is_told() -> None:
    """429, and nothing of it stays."""
    room = BodyRoom(10, most_waiting=1, patience_s=0.05)
    await room.enter(ACME, 10)
    first = await waiting(room, 1)
    with pytest.raises(RateLimited):
        await room.enter(ACME, 1)
    with pytest.raises(RateLimited):
        await first
    room.leave(ACME, 10)
    assert room._rooms == {}


async def test_who_leaves_as_room_is_made_is_passed_over() -> None:
    """In one turn of the loop: the one who left is out of the line before its task has run."""
    room = BodyRoom(10)
    await room.enter(ACME, 10)
    first, second = await waiting(room, 5), await waiting(room, 5)
    first.cancel()
    room.leave(ACME, 10)
    with pytest.raises(asyncio.CancelledError):
        await first
    await second
    assert room.held(ACME) == 5


async def test_who_leaves_makes_room_for_the_next() -> None:
    """In line, or in the moment in which it is let in."""
    room = BodyRoom(10)
    await room.enter(ACME, 5)
    large, small = await waiting(room, 10), await waiting(room, 5)
    large.cancel()
    await small
    last = await waiting(room, 5)
    room.leave(ACME, 5)
    last.cancel()  # it has been let in, and does not know it yet
    await asyncio.gather(last, return_exceptions=True)
    assert room.held(ACME) == 5
    room.leave(ACME, 5)
    assert room._rooms == {}
