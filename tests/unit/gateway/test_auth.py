"""Keys in memory: who is known, for how long, at what price; on a real SQLite file."""

import asyncio
import gc
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import RowMapping, event, insert, update
from sqlalchemy.ext.asyncio import AsyncEngine

from adapter_store.catalog import Provenance, Version
from adapter_store.changes import change_counter, changes, record_change
from adapter_store.errors import StorageUnavailable
from adapter_store.ids import AdapterId, TenantId, VersionId
from adapter_store.store import AdapterStore
from adapter_store.transactions import writing
from gateway.api_key import ApiKey
from gateway.auth import Auth
from gateway.change_feed import ChangeFeed
from gateway.database import migrate, open_engine
from gateway.errors import GrantTooWide, KeyInvalid, KeyIsOver, TooManyKeys
from gateway.fresh_cache import FreshCache
from gateway.freshness import Freshness
from gateway.keys import ANYONE, Keys, _key_of, new_secret
from gateway.models import Models
from gateway.plans import COLUMNS as PLAN_COLUMNS
from gateway.plans import Plan, Plans
from gateway.tenants import Scope, Tenants

KEY_BYTES_LIMIT = 15 * 2**20 / 20_000
VERSION_BYTES_LIMIT = 90 * 2**20 / 100_000
SERVING = frozenset({Scope.INFERENCE})


class Clock:
    """A clock that a test moves."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Bench:
    """The parts on one database, and what a test needs to move them."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "tailor.db"
        self.engine = open_engine(f"sqlite+aiosqlite:///{self.file}")
        self.wall = Clock(1_800_000_000.0)
        self.monotonic = Clock(1_000.0)
        self.freshness = Freshness(60, clock=self.monotonic)
        self.tenants = Tenants(self.engine)
        self.plans = Plans(self.engine)
        self.keys = Keys(self.engine, clock=self.wall)
        self.auth = Auth(self.keys, self.freshness, clock=self.wall)
        self.feed = ChangeFeed(self.engine, [self.auth.take_in], [self.auth.clear], self.freshness)

    async def key(self, tenant: str = "acme", scopes: frozenset[Scope] = SERVING, **more: Any) -> bytes:
        """A new key's header; the tenant is made on first use."""
        known = {found.name: found.id for found in await self.tenants.page(None, 100)}
        tenant_id = known.get(tenant) or (await self.tenants.create(tenant)).id
        _, secret = await self.keys.create(tenant_id, scopes, maker=None, **more)
        return b"Bearer " + secret.encode()

    async def live(self, header: bytes) -> ApiKey:
        return await self.auth.live_key(header)

    @contextmanager
    def away(self) -> Iterator[None]:
        """The database cannot be opened; its connections must be closed before."""
        kept = self.file.with_name("kept.db")
        self.file.rename(kept)
        self.file.mkdir()
        yield
        self.file.rmdir()
        kept.rename(self.file)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    await migrate(bench.engine)
    await bench.feed.start()
    yield bench
    await bench.engine.dispose()


@contextmanager
def counted_queries(engine: AsyncEngine) -> Iterator[list[str]]:
    seen: list[str] = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("SELECT"):
            seen.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    yield seen
    event.remove(engine.sync_engine, "before_cursor_execute", note)


async def test_a_known_key_costs_no_query(bench: Bench) -> None:
    """The first use asks the database once, however many ask at once; later ones do not."""
    header = await bench.key()
    assert bench.auth.known(header) is None
    with counted_queries(bench.engine) as queries:
        found = await asyncio.gather(*(bench.live(header) for _ in range(20)))
        assert bench.auth.known(header) is found[0]
        await bench.live(header)
    assert len(queries) == 1


@pytest.mark.parametrize("header", [None, b"", b"Bearer", b"Bearer ", b"Basic x", b"Bearer " + b"x" * 300, b"\xff" * 9])
async def test_what_is_no_key_is_refused(bench: Bench, header: bytes | None) -> None:
    """Without looking for it where it cannot be one."""
    assert bench.auth.known(header) is None
    with pytest.raises(KeyInvalid):
        await bench.auth.live_key(header)


class SlowKeys(Keys):
    """Has read a key's row, and gives it once it may."""

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__(engine)
        self.inside, self.go_on = asyncio.Event(), asyncio.Event()

    async def by_hash(self, sha256: bytes) -> ApiKey | None:
        found = await super().by_hash(sha256)
        self.inside.set()
        await self.go_on.wait()
        return found


@pytest.mark.parametrize(
    "secret",
    ["sk-tailor-nope", "sk-tailor-" + "0" * 42, "sk-tailor-" + "0" * 44, "sk-tailor-" + "0" * 42 + "-", "0" * 53],
)
async def test_what_is_not_spelled_like_a_key_costs_no_query(bench: Bench, secret: str) -> None:
    """One character less, more, or of another kind."""
    with counted_queries(bench.engine) as queries, pytest.raises(KeyInvalid):
        await bench.auth.live_key(f"Bearer {secret}".encode())
    assert queries == []


async def test_a_key_that_is_unknown_is_not_asked_for_again_at_once(bench: Bench) -> None:
    """For two seconds, however often it comes; what is remembered has a bound, which drops what came first."""
    header = f"Bearer {new_secret()}".encode()
    with counted_queries(bench.engine) as queries:
        for after_s, asked in ((0.0, 1), (1.9, 1), (0.2, 2), (0.0, 2)):
            bench.monotonic.now += after_s
            for _ in range(10):
                with pytest.raises(KeyInvalid):
                    await bench.auth.live_key(header)
            assert len(queries) == asked
    for _ in range(1_100):
        with pytest.raises(KeyInvalid):
            await bench.auth.live_key(f"Bearer {new_secret()}".encode())
    assert len(bench.auth._unknown) == 1_024
    with counted_queries(bench.engine) as queries, pytest.raises(KeyInvalid):
        await bench.auth.live_key(header)
    assert len(queries) == 1


async def test_a_key_that_was_asked_for_before_it_was_made_works_with_the_next_change(bench: Bench) -> None:
    """At once where it was made, with the next look at the change feed elsewhere."""
    acme = (await bench.tenants.create("acme")).id
    other = Auth(bench.keys, bench.freshness, clock=bench.wall)
    secret = new_secret()
    header = f"Bearer {secret}".encode()
    for auth in (bench.auth, other):
        with pytest.raises(KeyInvalid):
            await auth.live_key(header)
    made, _ = await bench.keys.create(acme, SERVING, maker=None, secret=secret)
    other.forget_unknown()  # as the route does
    assert (await other.live_key(header)).id == made.id
    await bench.feed.catch_up()
    assert (await bench.live(header)).id == made.id


async def test_a_key_that_is_made_while_it_is_looked_up_is_not_remembered_as_unknown(bench: Bench) -> None:
    """The lookup that began before does not refuse it afterwards."""
    acme = (await bench.tenants.create("acme")).id
    slow = SlowKeys(bench.engine)
    auth = Auth(slow, bench.freshness, clock=bench.wall)
    secret = new_secret()
    header = f"Bearer {secret}".encode()
    task = asyncio.create_task(auth.live_key(header))
    await slow.inside.wait()
    made, _ = await bench.keys.create(acme, SERVING, maker=None, secret=secret)
    auth.forget_unknown()
    slow.go_on.set()
    with pytest.raises(KeyInvalid):
        await task
    assert (await auth.live_key(header)).id == made.id


async def test_a_key_ends_with_its_day(bench: Bench) -> None:
    """To the second, also where it is cached."""
    header = await bench.key(expires_at=1_800_000_100)
    await bench.live(header)
    bench.wall.now = 1_800_000_099.9
    assert bench.auth.known(header) is not None
    bench.wall.now = 1_800_000_100
    assert bench.auth.known(header) is None
    with pytest.raises(KeyInvalid):
        await bench.live(header)


async def test_nothing_is_served_past_the_bound_on_staleness(bench: Bench) -> None:
    """While the change feed cannot be read cached keys serve for 60 s, then nobody is let in."""
    header = await bench.key()
    await bench.live(header)
    await bench.feed.catch_up()
    await bench.engine.dispose()
    with bench.away():
        bench.monotonic.now += 59.9
        with pytest.raises(StorageUnavailable):
            await bench.feed.catch_up()
        assert bench.auth.known(header) is not None
        bench.monotonic.now += 0.1
        assert bench.auth.known(header) is None
        with pytest.raises(StorageUnavailable):
            await bench.live(header)
    await bench.feed.catch_up()
    assert bench.auth.known(header) is not None


async def test_a_key_revoked_while_the_database_was_away_stops_when_it_is_back(bench: Bench) -> None:
    """The feed is caught up with before anything that was cached is true again."""
    header = await bench.key()
    key = await bench.live(header)
    other = Keys(bench.engine)
    await other.revoke(ANYONE, key.id)
    bench.monotonic.now += 100  # nothing was read of the feed meanwhile
    assert bench.auth.known(header) is None
    await bench.feed.catch_up()
    with pytest.raises(KeyInvalid):
        await bench.live(header)


async def test_a_change_of_plan_reaches_every_key_of_its_tenants(bench: Bench) -> None:
    """They share one plan; other tenants' keys stay known."""
    await bench.plans.create(Plan("gold", weight=2.0))
    first, second, other = await bench.key(), await bench.key(), await bench.key("globex")
    await bench.tenants.change("acme", plan="gold")
    one, two, foreign = [await bench.live(header) for header in (first, second, other)]
    assert one.plan is two.plan
    assert (one.plan.weight, foreign.plan.weight) == (2.0, 1.0)
    await bench.feed.catch_up()
    await bench.plans.change("gold", {"weight": 3.0, "tokens_per_minute": 7})
    await bench.feed.catch_up()
    assert bench.auth.known(first) is None
    assert bench.auth.known(other) is foreign
    changed = await bench.live(second)
    assert (changed.plan.weight, changed.plan.tokens_per_minute) == (3.0, 7)


async def test_what_was_read_before_a_change_is_not_kept(bench: Bench) -> None:
    """A revocation that comes in the middle of a lookup is seen by the next one."""
    header = await bench.key()
    slow = SlowKeys(bench.engine)
    auth = Auth(slow, bench.freshness, clock=bench.wall)
    task = asyncio.create_task(auth.live_key(header))
    await slow.inside.wait()
    key = await bench.live(header)
    auth.forget((await bench.keys.revoke(ANYONE, key.id)).sha256)
    slow.go_on.set()
    assert (await task).id == key.id
    assert auth.known(header) is None
    with pytest.raises(KeyInvalid):
        await auth.live_key(header)


async def test_who_leaves_takes_no_lookup_from_the_others() -> None:
    """A lookup belongs to all that wait for it."""
    cache: FreshCache[str, int] = FreshCache(10)
    go_on = asyncio.Event()

    async def read() -> int:
        await go_on.wait()
        return 1

    leaving, staying = (asyncio.create_task(cache.fill("x", read)) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    go_on.set()
    assert await staying == 1
    assert cache.get("x") == 1


async def test_what_is_used_outlives_what_is_not() -> None:
    """The cache stays within its bound and drops what was not asked for."""
    cache: FreshCache[int, int] = FreshCache(10)

    async def read() -> int:
        return 1

    for number in range(100):
        await cache.fill(number, read)
        assert cache.get(0) == 1
        assert len(cache) <= 10
    assert cache.get(1) is None


async def test_uses_are_kept_until_they_can_be_written(bench: Bench) -> None:
    """Each key is noted once a minute; a database that is away loses none, an older note never replaces a newer."""
    header = await bench.key()
    key = await bench.live(header)
    bench.monotonic.now += 59  # too soon to be noted again
    bench.wall.now += 59
    bench.auth.known(header)
    await bench.engine.dispose()
    with bench.away(), pytest.raises(StorageUnavailable):
        await bench.auth.uses.flush()
    await bench.auth.uses.flush()
    (kept,) = await bench.keys.page(key.tenant_id, None, 10)
    assert kept.last_used_at == 1_800_000_000
    await bench.feed.catch_up()
    bench.monotonic.now += 2
    bench.wall.now += 2
    bench.auth.known(header)
    await bench.auth.uses.flush()
    await bench.keys.note_uses([(key.id, 5)])
    (kept,) = await bench.keys.page(key.tenant_id, None, 10)
    assert kept.last_used_at == 1_800_000_061


async def test_a_rotated_key_goes_on_for_its_overlap(bench: Bench) -> None:
    """To the second; the successor has the same scopes, label and end, and what is over is not rotated."""
    maker = await bench.live(await bench.key(scopes=frozenset({Scope.ADMIN, Scope.INFERENCE})))
    header = await bench.key(label="shop", expires_at=1_900_000_000)
    old = await bench.live(header)
    rotation = await bench.keys.rotate(old.tenant_id, old.id, maker=maker, overlap_s=60)
    assert (rotation.made.label, rotation.made.expires_at, rotation.made.scopes) == ("shop", 1_900_000_000, old.scopes)
    assert (rotation.made.replaces, rotation.made.created_by) == (old.id, maker.id)
    await bench.feed.catch_up()
    bench.wall.now += 59.9
    assert (await bench.live(header)).id == old.id
    bench.wall.now += 0.1
    with pytest.raises(KeyInvalid):
        await bench.live(header)
    assert (await bench.live(b"Bearer " + rotation.secret.encode())).id == rotation.made.id
    with pytest.raises(KeyIsOver):
        await bench.keys.rotate(old.tenant_id, old.id, maker=maker, overlap_s=60)


async def test_an_overlap_prolongs_nothing(bench: Bench) -> None:
    """A key that ends before its overlap does ends as it would have."""
    maker = await bench.live(await bench.key(scopes=frozenset({Scope.ADMIN, Scope.INFERENCE})))
    old = await bench.live(await bench.key(expires_at=1_800_000_010))
    await bench.keys.rotate(old.tenant_id, old.id, maker=maker, overlap_s=60)
    kept = [key for key in await bench.keys.page(old.tenant_id, None, 10) if key.id == old.id]
    assert kept[0].expires_at == 1_800_000_010


async def test_a_key_whose_end_is_not_heard_of_yet_makes_no_successor(bench: Bench) -> None:
    """A revoked maker that some gateway still has in memory could outlive its revocation by what it makes."""
    maker = await bench.live(await bench.key(scopes=frozenset({Scope.ADMIN, Scope.INFERENCE})))
    target = await bench.live(await bench.key())
    await Keys(bench.engine).revoke(ANYONE, maker.id)
    assert not maker.revoked  # this gateway does not know
    with pytest.raises(KeyInvalid):
        await bench.keys.create(maker.tenant_id, SERVING, maker=maker)
    with pytest.raises(KeyInvalid):
        await bench.keys.rotate(maker.tenant_id, target.id, maker=maker, overlap_s=0)


async def test_rotation_is_no_way_around_the_makers_bounds(bench: Bench) -> None:
    """Neither to its scopes nor past its end."""
    maker = await bench.live(await bench.key(scopes=frozenset({Scope.ADMIN}), expires_at=1_800_000_500))
    wide = await bench.live(await bench.key(expires_at=1_800_000_400))
    long = await bench.live(await bench.key(scopes=frozenset({Scope.ADMIN})))
    for key in (wide, long):
        with pytest.raises(GrantTooWide):
            await bench.keys.rotate(key.tenant_id, key.id, maker=maker, overlap_s=0)


async def test_a_tenant_has_an_end_of_keys(bench: Bench) -> None:
    """Its own admin cannot fill the database; a revoked key makes room, and other tenants have their own."""
    keys = Keys(bench.engine, live_limit=2)
    maker = await bench.live(await bench.key(scopes=frozenset({Scope.ADMIN, Scope.INFERENCE})))
    made, _ = await keys.create(maker.tenant_id, SERVING, maker=maker)
    with pytest.raises(TooManyKeys):
        await keys.create(maker.tenant_id, SERVING, maker=maker)
    other = await bench.tenants.create("globex")
    await keys.create(other.id, SERVING, maker=None)
    await keys.revoke(maker.tenant_id, made.id)
    await keys.create(maker.tenant_id, SERVING, maker=maker)


async def test_rotation_is_no_way_around_the_end_of_keys(bench: Bench) -> None:
    """While the old key goes on it counts beside its successor; without an overlap the two change places."""
    keys = Keys(bench.engine, live_limit=2)
    maker = await bench.live(await bench.key(scopes=frozenset({Scope.ADMIN, Scope.INFERENCE})))
    old, _ = await keys.create(maker.tenant_id, SERVING, maker=maker)
    with pytest.raises(TooManyKeys):
        await keys.rotate(maker.tenant_id, old.id, maker=maker, overlap_s=60)
    await keys.rotate(maker.tenant_id, old.id, maker=maker, overlap_s=0)


async def test_a_long_absence_is_made_up_for_at_once(bench: Bench) -> None:
    """Page after page, in order, without waiting between them."""
    heard: list[str | None] = []
    feed = ChangeFeed(bench.engine, [lambda change: heard.append(change.name)], [], bench.freshness)
    await feed.start()
    names = [str(number) for number in range(2_500)]
    async with writing(bench.engine) as connection:
        first = await record_change(connection, "adapter", TenantId("t"), names[0])
        rows = [{"seq": first + int(name), "noun": "adapter", "name": name, "at": 0} for name in names[1:]]
        await connection.execute(insert(changes), rows)
        await connection.execute(update(change_counter).values(value=first + 2_499))
    await feed.catch_up()
    assert heard == names


async def test_an_older_database_empties_the_caches(bench: Bench) -> None:
    """A restored backup has forgotten changes and numbers the next ones anew: what was cached may not be true."""
    header = await bench.key()
    await bench.engine.dispose()
    backup = bench.file.read_bytes()
    await bench.tenants.change("acme", suspended=True)
    await bench.tenants.change("acme", suspended=False)
    await bench.feed.catch_up()
    await bench.live(header)
    assert bench.auth.known(header) is not None
    await bench.engine.dispose()
    bench.file.write_bytes(backup)
    await bench.feed.catch_up()
    assert bench.auth.known(header) is None


class Rows(Keys):
    """Gives each key as its row would, without the thousands of queries that a measurement would wait for."""

    async def by_hash(self, sha256: bytes) -> ApiKey | None:
        number = int(sha256[:4].hex(), 16)
        plan = dict(zip((column.name for column in PLAN_COLUMNS), astuple(Plan()), strict=True))
        row = {
            "id": f"key_{number:024d}",
            "tenant_id": f"tnt_{number // 2:024d}",
            "scopes": " ".join(["adapters", "inference", "training"]),
            "expires_at": 1_900_000_000 + number,
            "revoked_at": None,
            "suspended_at": None,
            **plan,
        }
        return _key_of(cast(RowMapping, row), sha256)


@pytest.mark.parametrize("count", [2_000, pytest.param(20_000, marks=pytest.mark.full)])
async def test_cached_keys_are_small(bench: Bench, count: int) -> None:
    """20,000 keys take 15 MiB at most (ordinary run: 2,000).

    The least of three times: what runs beside, left by other tests of this process, is traced too.
    """
    headers = [f"Bearer sk-tailor-{number:043d}".encode() for number in range(count)]
    used = []
    for _ in range(3):
        auth = Auth(Rows(bench.engine))
        await auth.live_key(headers[0])
        before = _traced_bytes(start=True)
        for header in headers:
            await auth.live_key(header)
        used.append(_traced_bytes(start=False) - before)
        assert auth.cached == count
    assert min(used) / count <= KEY_BYTES_LIMIT


@pytest.mark.parametrize("count", [5_000, pytest.param(100_000, marks=pytest.mark.full)])
def test_cached_versions_are_small(count: int) -> None:
    """100,000 versions of 10,000 tenants take 90 MiB at most (ordinary run: 5,000)."""
    models = Models(cast(AdapterStore, None), "base")  # nothing is asked of the store
    modules, fingerprint = ("q_proj", "v_proj"), "f" * 64
    owners = [TenantId(f"tnt_{number:024d}") for number in range(count // 10)]
    before = _traced_bytes(start=True)
    for number in range(count):
        version = Version(
            id=VersionId(f"ver_{number:024d}"),
            adapter_id=AdapterId(f"adp_{number:024d}"),
            tenant_id=owners[number // 10],
            adapter_name=f"support-bot-{number}",
            number=1,
            digest=f"{number:064x}",
            file_hashes=number.to_bytes(64, "big"),
            config_bytes=700 + number,
            weights_bytes=10_000_000 + number,
            rank=16,
            modules=modules,
            base_fingerprint=fingerprint,
            provenance=Provenance.UPLOAD,
            created_at=1_700_000_000 + number,
        )
        models._keep(version.tenant_id, version.adapter_name, version)
    used = _traced_bytes(start=False) - before
    assert len(models) == count
    assert used / count <= VERSION_BYTES_LIMIT


def _traced_bytes(*, start: bool) -> int:
    gc.collect()
    if start:
        tracemalloc.start()
    size, _ = tracemalloc.get_traced_memory()
    if not start:
        tracemalloc.stop()
    return size
