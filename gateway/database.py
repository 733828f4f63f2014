"""The database: opened by URL, brought to the newest schema, and the gateway's own tables.

SQLite (the default) runs in WAL mode with synchronous=FULL: what was committed survives a power cut.
PostgreSQL takes the same statements. Times are whole seconds since 1970, UTC: the same in both, and nothing
to convert.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    event,
    insert,
    inspect,
    text,
)
from sqlalchemy.engine import Engine, make_url
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import DisconnectionError
from sqlalchemy.pool import ConnectionPoolEntry

from adapter_store import (  # noqa: F401  for their tables
    changes,
    erasure,
    examples,
    grants,
    proofs,
    scaling,
    signing,
    uploads,
)
from adapter_store.catalog import metadata
from adapter_store.engine import AsyncEngine, create_async_engine
from adapter_store.errors import AdapterStoreError
from adapter_store.transactions import TURNS, WRITES, Turns, reading, writing
from gateway import idempotency  # noqa: F401  its table
from training import evaluations, files, jobs  # noqa: F401  their tables

MIGRATIONS = Path(__file__).parent / "migrations"
HEAD = "0015"  # the newest file in migrations/versions; a test holds the two together
CONNECTIONS = 4
ANSWER_S = 10.0  # patience with PostgreSQL: one that hangs is as good as away
MIGRATION_LOCK = 7_461_696_972  # any number: what PostgreSQL's advisory lock is known by

tenants = Table(
    "tenants",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("plan", Text, nullable=False, server_default="default"),
    Column("suspended_at", BigInteger),
)
plans = Table(  # null: no limit
    "plans",
    metadata,
    Column("name", Text, primary_key=True),
    Column("weight", Double, nullable=False),
    Column("requests_per_minute", BigInteger),
    Column("tokens_per_minute", BigInteger),
    Column("concurrent_requests", BigInteger),
    Column("max_output_tokens", BigInteger),
    Column("max_prompt_bytes", BigInteger),
    Column("tokens_per_month", BigInteger),
    Column("loads_per_minute", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("pinned_adapters", BigInteger, nullable=False, server_default="0"),  # the one that is never null
    Column("max_adapters", BigInteger),
    Column("max_versions", BigInteger),
    Column("max_stored_bytes", BigInteger),
    Column("max_rank", BigInteger),
    Column("max_files", BigInteger),
    Column("max_stored_file_bytes", BigInteger),
    Column("max_queued_jobs", BigInteger),
    Column("max_running_jobs", BigInteger),
)
api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Text, primary_key=True),
    Column("tenant_id", Text, ForeignKey("tenants.id", name="fk_api_keys_tenant_id")),  # null: an operator's
    Column("sha256", Text, nullable=False, unique=True),  # hex; the key itself is kept nowhere
    Column("prefix", Text, nullable=False),  # its first characters, for lists
    Column("scopes", Text, nullable=False),  # separated by spaces
    Column("label", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("revoked_at", BigInteger),
    Column("last_used_at", BigInteger),
    Column("created_by", Text),  # id of the key that made it; null: the machine's owner
    Column("replaces", Text),  # id of the key that it was rotated from
    Index("ix_api_keys_tenant_id", "tenant_id"),
)
usage = Table(  # tokens by hour; the base model is adapter '' version 0
    "usage",
    metadata,
    Column("hour", BigInteger, primary_key=True, autoincrement=False),  # its first second
    Column("tenant_id", Text, primary_key=True),
    Column("adapter", Text, primary_key=True),
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("requests", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Index("ix_usage_tenant_id_hour", "tenant_id", "hour"),
)
usage_batches = Table(  # which batches of a gateway's journal are in `usage` already
    "usage_batches",
    metadata,
    Column("id", Text, primary_key=True),
    Column("at", BigInteger, nullable=False),
)
replicas = Table(  # those added at run time; `drained_at`: an operator keeps requests away
    "replicas",
    metadata,
    Column("url", Text, primary_key=True),
    Column("created_at", BigInteger, nullable=False),
    Column("drained_at", BigInteger),
)
quarantine = Table(  # `until` null: until it is lifted; lifted rows stay, so that no alarm is heard twice
    "quarantine",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("digest", Text, primary_key=True),
    Column("reason", Text, nullable=False),
    Column("replica", Text, nullable=False),
    Column("generation", Text, nullable=False),
    Column("strikes", Integer, nullable=False),
    Column("at", BigInteger, nullable=False),
    Column("until", BigInteger),
    Column("lifted_at", BigInteger),
)
pins = Table(  # adapters, by name, that stay loaded
    "pins",
    metadata,
    Column("tenant_id", Text, primary_key=True),
    Column("adapter", Text, primary_key=True),
    Column("pinned_by", Text, nullable=False),  # tenant or operator
    Column("at", BigInteger, nullable=False),
)


class SchemaUnknown(AdapterStoreError):
    """The database or a snapshot is of a schema that this version does not know."""


DEFAULT_PLAN = {"name": "default", "weight": 1.0, "created_at": 0}


def open_engine(url: str, *, busy_timeout_s: float = 5.0) -> AsyncEngine:
    """An engine for `sqlite+aiosqlite:///path` or `postgresql+asyncpg://…`; connects on first use.

    `busy_timeout_s`: how long a SQLite writer waits for its turn among this engine's and then for other processes',
    whoever finds all connections taken for one, and a connection to PostgreSQL for its server. Errors quote statements
    without their parameters: those are tenants' names and keys' hashes, and errors are logged.
    """
    parts = make_url(url)
    if parts.get_backend_name() != "sqlite":
        timeouts = {"timeout": busy_timeout_s, "command_timeout": ANSWER_S}
        return create_async_engine(
            parts, pool_pre_ping=True, pool_timeout=busy_timeout_s, connect_args=timeouts, hide_parameters=True
        )
    from gateway.sqlite import open_connection  # here, because PostgreSQL does without it

    path = Path(parts.database).absolute() if parts.database else None
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        path.touch(mode=0o600)  # here alone: where the file has gone later, an empty one must not take its place
    engine = create_async_engine(
        parts,
        pool_size=CONNECTIONS,
        max_overflow=0,
        pool_timeout=busy_timeout_s,
        connect_args={"timeout": busy_timeout_s, "async_creator_fn": open_connection},
        execution_options={TURNS: Turns(busy_timeout_s)},
        hide_parameters=True,
    )
    event.listen(engine.sync_engine, "begin", _begin_sqlite)
    if path is not None:
        _stay_with_the_file(engine.sync_engine, path)
    return engine


def _stay_with_the_file(engine: Engine, path: Path) -> None:
    """Connections to a file that has been moved away, or that another has taken the place of, are not used again.

    SQLite itself goes on reading and writing the file that it has opened: what is acknowledged would be gone.
    """

    def identity() -> tuple[int, int] | None:
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def before_connect(_: object, __: object, arguments: list[Any], options: dict[str, Any]) -> None:
        arguments[0] = f"file:{quote(str(path))}?mode=rw"
        options["uri"] = True

    def on_connect(_: DBAPIConnection, record: ConnectionPoolEntry) -> None:
        record.info["file"] = identity()

    def on_checkout(_: DBAPIConnection, record: ConnectionPoolEntry, __: object) -> None:
        if record.info["file"] != identity():
            raise DisconnectionError("the database is not where it was")

    event.listen(engine, "do_connect", before_connect)
    event.listen(engine, "connect", on_connect)
    event.listen(engine, "checkout", on_checkout)


def _begin_sqlite(connection: Connection) -> None:
    """A writer takes the lock at once: a later upgrade from reading would fail instead of waiting."""
    writes = WRITES.items() <= connection.get_execution_options().items()
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


async def migrate(engine: AsyncEngine) -> None:
    """Brings the schema to HEAD; several processes may call it at once, one does the work.

    An empty database is given today's tables at once. So Alembic, which costs a third of a second and 14 MB,
    is imported only where an older schema is found.
    """
    async with reading(engine) as connection:
        revision = await connection.run_sync(stored_revision)
    if revision != HEAD:
        await _in_turn(engine, _bring_to_head)


async def downgrade(engine: AsyncEngine, revision: str) -> None:
    """Back to an older revision, or to `base`: no tables."""
    await _in_turn(engine, lambda connection: _run_alembic(connection, "downgrade", revision))


async def _in_turn(engine: AsyncEngine, work: Callable[[Connection], None]) -> None:
    """Does the work in one transaction that other processes' migrations wait for."""
    async with writing(engine) as connection:
        if connection.dialect.name == "postgresql":  # on SQLite, BEGIN IMMEDIATE is the lock
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
        await connection.run_sync(work)


def _bring_to_head(connection: Connection) -> None:
    if not inspect(connection).get_table_names():
        _create_schema(connection)
    elif stored_revision(connection) != HEAD:  # or another process was faster
        _run_alembic(connection, "upgrade", HEAD)


def _create_schema(connection: Connection) -> None:
    """What all migrations together make; a test compares the two."""
    metadata.create_all(connection)
    connection.execute(insert(changes.change_counter).values(id=1, value=0))
    connection.execute(insert(plans).values(DEFAULT_PLAN))
    connection.execute(text("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL PRIMARY KEY)"))
    connection.execute(text("INSERT INTO alembic_version VALUES (:head)"), {"head": HEAD})


async def replace_schema(engine: AsyncEngine, revision: str, fill: Callable[[Connection], None]) -> None:
    """Drops every table, makes those of `revision`, has `fill` write their rows, and brings them to HEAD: in one
    transaction. Raises SchemaUnknown."""

    def replace(connection: Connection) -> None:
        found = MetaData()
        found.reflect(connection)
        found.drop_all(connection)
        _run_alembic(connection, "upgrade", revision)
        made = MetaData()
        made.reflect(connection)
        for table in reversed(made.sorted_tables):
            if table.name != "alembic_version":
                connection.execute(table.delete())
        fill(connection)
        _run_alembic(connection, "upgrade", HEAD)

    if not any(path.name.startswith(f"{revision}_") for path in (MIGRATIONS / "versions").iterdir()):
        raise SchemaUnknown(f"the schema {revision} is newer than this version's {HEAD}: use a newer version")
    await _in_turn(engine, replace)


def stored_revision(connection: Connection) -> str | None:
    """What schema the database has."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    revision: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return revision


def _run_alembic(connection: Connection, direction: str, revision: str) -> None:
    from alembic import command
    from alembic.config import Config

    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    move = command.upgrade if direction == "upgrade" else command.downgrade
    move(config, revision)
