"""The fake replica's engine as load tests use it: slots with LRU, loads that cost, a prefix cache."""

import asyncio

from loadtests.fake.__main__ import BLOCK_TOKENS, PrefixCache
from loadtests.fake.engine import EngineModel, Sequence


async def test_the_least_recently_run_adapter_leaves_its_slot() -> None:
    """Two slots, three adapters: who comes back later has to be put in again, and that takes time."""
    engine = EngineModel(max_loras=2, base_step_s=0.001, per_sequence_s=0, slots=True, activate_s=0.1)
    engine.start()
    for adapter in ("a", "b", "a", "c"):
        await asyncio.wait_for(ran(engine, adapter), 10)
    assert list(engine.on_device) == ["a", "c"]
    assert engine.activations == 3
    begin = engine.now_s
    await asyncio.wait_for(ran(engine, "a"), 10)
    assert engine.now_s - begin < 0.1
    await asyncio.wait_for(ran(engine, "b"), 10)
    assert engine.now_s - begin > 0.1
    assert list(engine.on_device) == ["a", "b"]
    await engine.stop()


def ran(engine: EngineModel, adapter: str) -> asyncio.Future[None]:
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    engine.add(Sequence(adapter, 0, 1, 1, lambda number: None, done))
    return done


def test_a_prompt_that_begins_as_an_earlier_one_is_cached_as_far() -> None:
    """In whole blocks, and for its own adapter alone."""
    cache, first = PrefixCache(), "a" * 4 * BLOCK_TOKENS * 3
    assert cache.hits("x", first + "end") == 0
    assert cache.hits("x", first + "another end") == 3
    assert cache.hits("x", "b" + first) == 0
    assert cache.hits("y", first + "end") == 0


async def test_a_frozen_engine_gives_nothing_whatever_comes() -> None:
    """New requests wake no step; thawed, it goes on with all of them."""
    engine = EngineModel(base_step_s=0.001)
    engine.start()
    engine.freeze()
    running = [ran(engine, "a") for _ in range(3)]
    await asyncio.sleep(0.05)
    running.append(ran(engine, "a"))
    await asyncio.sleep(0.05)
    assert (engine.tokens, engine.frozen) == (0, True)
    engine.thaw()
    await asyncio.wait_for(asyncio.gather(*running), 10)
    assert engine.tokens == 4
    await engine.stop()
