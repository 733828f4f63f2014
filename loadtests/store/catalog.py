"""With many versions in the database: pages, names, and how fast small adapters are published."""

import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtests.figures import Row
from loadtests.overhead.processes import cpu_ns, listeners
from loadtests.overhead.stack import Gateway, fingerprint_of, mock_upstream
from loadtests.store import programs
from loadtests.store.adapters import SMALL, write_adapter, write_base
from loadtests.store.client import Answer, connected
from loadtests.store.gateway import good
from loadtests.store.report import row

PROGRAM: Final = "tests.bench.catalog"
BASE_NAME: Final = "small"
FEW: Final = ("100", "10")  # versions, tenants
PAGE: Final = 100
NAMES: Final = 3
"""Every so many publishes a tenant takes a new name."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much there is (versions, tenants), and how often each is asked."""

    size: tuple[str, str]
    pages: int
    rounds: int
    publishes: int
    connections: int


QUICK: Final = Effort(("5000", "500"), pages=20, rounds=3, publishes=40, connections=8)
FULL: Final = Effort(("100000", "10000"), pages=200, rounds=20, publishes=400, connections=8)


def catalog_rows(folder: Path, effort: Effort, database_url: str | None) -> Iterator[Row]:
    """The figures; `database_url`: an empty PostgreSQL, where it is not to be SQLite.

    Raises:
        CannotMeasureError: something does not start, or a request is refused.
    """
    home = folder / "home"
    home.mkdir(parents=True)
    few, many = f"sqlite+aiosqlite:///{folder}/few.db", f"sqlite+aiosqlite:///{home}/tailor.db"
    with ExitStack() as held:
        if database_url is not None:
            few = held.enter_context(programs.running("tests.bench.postgres")).hear()["url"]
            many = database_url
        programs.run(PROGRAM, few, *FEW, "fill")
        (filled,) = programs.run(PROGRAM, many, *effort.size, "fill")
        yield resolve_row([(few, *FEW), (many, *effort.size)], effort)
        base = write_base(folder / BASE_NAME, SMALL)
        upstream = held.enter_context(mock_upstream(folder, fingerprint_of(base), core=None))
        settings = {"TAILOR_DATABASE_URL": many}
        gateway = held.enter_context(Gateway(folder, base, upstream, None, settings).started())
        yield from page_rows(gateway.port, filled["keys"][0], filled["largest"], effort)
        yield from publish_rows(gateway.port, filled["keys"], folder / "adapters", effort)


def resolve_row(databases: Sequence[tuple[str, str, str]], effort: Effort) -> Row:
    """With few and with many, turn by turn; the least of the turns counts, since what else runs only ever adds."""
    with ExitStack() as held:
        few, many = (held.enter_context(programs.running(PROGRAM, *database, "measure")) for database in databases)
        turns = [
            [float(program.ask(way)["cpu_us"]) for way in ("uncached", "cached") for program in (few, many)]
            for _ in range(effort.rounds)
        ]
    uncached_few, uncached_many, cached_few, cached_many = (min(column) for column in zip(*turns, strict=True))
    return row(
        "resolve_cpu_ratio", uncached_many / uncached_few,
        versions=int(effort.size[0]), database=databases[1][0].partition("+")[0],
        cpu_us_with_few=round(uncached_few, 1), cpu_us_with_many=round(uncached_many, 1),
        cached_cpu_us_with_few=round(cached_few, 3), cached_cpu_us_with_many=round(cached_many, 3),
    )  # fmt: skip


def page_rows(port: int, key: str, largest: str, effort: Effort) -> Iterator[Row]:
    """CPU of the gateway, all its threads, for pages of the large tenant's."""
    pids = listeners(port)
    with connected(port, key) as tenant:
        cursor = good(tenant.ask("GET", "/v1/adapters?limit=1")).json()["data"][0]["name"]
        for figure, path, field in (
            ("list_page_cpu_ms", f"/v1/adapters?limit={PAGE}&after={cursor}", "data"),
            ("versions_page_cpu_ms", f"/v1/adapters/{largest}?limit={PAGE}", "versions"),
        ):
            items = len(good(tenant.ask("GET", path)).json()[field])
            begin, spent = time.monotonic(), cpu_ns(pids)
            for _ in range(effort.pages):
                good(tenant.ask("GET", path))
            spent_ms, took_ms = (cpu_ns(pids) - spent) / 1e6, (time.monotonic() - begin) * 1e3
            yield row(figure, spent_ms / effort.pages, items=items, took_ms=round(took_ms / effort.pages, 2))


def publish_rows(port: int, keys: Sequence[str], folder: Path, effort: Effort) -> Iterator[Row]:
    """Tenants publish at once, each on a connection of its own: all adapters differ, every third has a new name."""
    each = effort.publishes // effort.connections
    made = [
        [write_adapter(folder / f"{tenant}-{at}", SMALL, BASE_NAME, seed=tenant * each + at) for at in range(each)]
        for tenant in range(effort.connections)
    ]
    pids = listeners(port)
    answers: list[Answer] = []

    def work(tenant: int) -> None:
        with connected(port, keys[tenant]) as connection:
            for at, files in enumerate(made[tenant]):
                answers.append(connection.publish(f"published-{at // NAMES}", files))

    with connected(port, keys[0]) as connection:  # what a first publish loads, is loaded
        good(connection.publish("first", write_adapter(folder / "first", SMALL, BASE_NAME, seed=effort.publishes)))
    threads = [threading.Thread(target=work, args=(tenant,)) for tenant in range(effort.connections)]
    begin, spent = time.monotonic(), cpu_ns(pids)
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took_s, spent_ms = time.monotonic() - begin, (cpu_ns(pids) - spent) / 1e6
    published = sum(answer.status == 201 for answer in answers)
    yield row(
        "publish_per_s", published / took_s, published=published, connections=effort.connections,
        cpu_ms_each=round(spent_ms / max(1, published), 2),
        p50_ms=round(statistics.median(answer.took_s for answer in answers) * 1e3, 1),
    )  # fmt: skip
    refused = sorted({f"{answer.status} {answer.body[:200]!r}" for answer in answers if answer.status != 201})
    yield row("failed_publishes", effort.connections * each - published, refused=refused)
