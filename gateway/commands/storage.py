"""`tailor backup`, `restore` and `store`: the operator's work on database and blobs, where the settings point to them.

They work on the storage itself, with or without a running gateway; `store faults` alone asks one.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gateway.commands.common import Json, OperatorKey, Url, operator_client, settings_of, show, show_table, told
from gateway.home import Home

if TYPE_CHECKING:
    from adapter_store.blobs import Blobs
    from adapter_store.engine import AsyncEngine
    from gateway.settings import Settings

app = typer.Typer()
store_app = typer.Typer(help="The adapters' storage: database and blobs.", no_args_is_help=True)
Place = Annotated[str, typer.Argument(help="A folder, or a URL that TAILOR_BLOBS_URL could have (s3://…).")]


@app.command()
def backup(
    to: Place,
    keep: Annotated[int | None, typer.Option(min=1, help="Keep so many snapshots, this one included.")] = None,
    as_json: Json = False,
) -> None:
    """Back up all rows and adapters as they are now; gateways may run. What is there already is not copied again."""
    from gateway.backup import back_up, keep_newest

    async def work(settings: "Settings") -> Any:
        async with _storage(settings) as (engine, blobs):
            target = _blobs(to)
            done = await back_up(engine, blobs, target)
            return done, await keep_newest(target, keep) if keep is not None else 0

    with told():
        done, dropped = _run(work)
    new = f"{done.copied} of them new ({done.copied_bytes:,} bytes), {dropped} old ones dropped"
    text = f"{done.snapshot}: {done.rows} rows, {done.blobs} blobs, {new}"
    show({**asdict(done), "dropped": dropped}, as_json, text)


@app.command()
def restore(
    source: Place,
    snapshot: Annotated[str | None, typer.Option(help="Which one; default: the newest.")] = None,
    check_only: Annotated[bool, typer.Option("--check", help="Read and verify all of it, restore nothing.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in the database.")] = False,
    as_json: Json = False,
) -> None:
    """Restore a backup, whole or not at all, to where the settings point. Stop the gateways first."""
    from gateway.backup import check
    from gateway.backup import restore as run_restore

    async def work(settings: "Settings") -> Any:
        origin = _blobs(source)
        if check_only:
            return await check(origin, snapshot)
        async with _storage(settings) as (engine, blobs):
            return await run_restore(engine, blobs, origin, snapshot, force=force)

    with told():
        done = _run(work)
    verb = "is whole" if check_only else "restored"
    show(asdict(done), as_json, f"{done.snapshot} {verb}: {done.rows} rows, {done.blobs} blobs")


@store_app.command("scrub")
def store_scrub(
    mib_per_s: Annotated[float, typer.Option(help="Read so fast at most.", min=0.001)] = 256.0,
    as_json: Json = False,
) -> None:
    """Read every stored adapter now, compare it with its digest, and repair it from TAILOR_BLOBS_COPY_URL."""
    from adapter_store.scrub import Scrubber

    async def work(settings: "Settings") -> Any:
        copy = _blobs(settings.blobs_copy_url) if settings.blobs_copy_url is not None else None
        async with _storage(settings) as (engine, blobs):
            scrubber = Scrubber(engine, blobs, copy, bytes_per_s=int(mib_per_s * (1 << 20)), every_s=0)
            return await scrubber.run(), await scrubber.faulty()

    with told():
        counts, faulty = _run(work)
    lines = [", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "nothing is stored"]
    lines += [f"{found.fault}: {found.tenant_id}/{found.sha256}: {' '.join(found.versions)}" for found in faulty]
    show({"counts": counts, "faults": [asdict(found) for found in faulty]}, as_json, "\n".join(lines))
    if faulty:
        raise typer.Exit(1)


@store_app.command("faults")
def store_faults(url: Url = None, key: OperatorKey = None, as_json: Json = False) -> None:
    """List stored files that are damaged or gone, as the gateways' scrubbers last saw them."""
    with told():
        found = operator_client(url, key).call("GET", "/admin/v1/storage/faults")["data"]
    show_table(found, as_json, ("fault", "tenant_id", "sha256", "versions", "found_at"))


@store_app.command("migrate")
def store_migrate(
    to: Annotated[
        str | None, typer.Option(help="Back to this older schema; default: forward to this version's.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring the database's schema forward, as every gateway does when it starts, or back, for an older version."""
    from gateway.database import HEAD, downgrade, migrate

    async def work(settings: "Settings") -> Any:
        async with _storage(settings) as (engine, _):
            await (migrate(engine) if to is None else downgrade(engine, to))

    with told():
        _run(work)
    show({"schema": to or HEAD}, as_json, f"the schema is {to or HEAD}")


def _run(work: "Callable[[Settings], Coroutine[Any, Any, Any]]") -> Any:
    settings = settings_of()
    Home(settings.home)
    return asyncio.run(work(settings))


def _blobs(url: str) -> "Blobs":
    from adapter_store.blobs import Blobs

    return Blobs.open(url)


@asynccontextmanager
async def _storage(settings: "Settings") -> "AsyncIterator[tuple[AsyncEngine, Blobs]]":
    from gateway.database import open_engine

    engine = open_engine(settings.database)
    try:
        yield engine, _blobs(settings.blobs)
    finally:
        await engine.dispose()
