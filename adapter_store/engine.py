"""SQLAlchemy's asynchronous engine, without its ORM; the one module that imports `sqlalchemy.ext.asyncio`.

That package's init imports `session` and `scoping`, and with them `sqlalchemy.orm`: 6 MiB in every process, for classes
that nobody here uses. So it runs when another name is asked of it: `from sqlalchemy.ext.asyncio import AsyncSession`
works in other code of the process, before this module and after it.
"""

from adapter_store.late import import_when_used

import_when_used("sqlalchemy.ext.asyncio")

from sqlalchemy.ext.asyncio.engine import AsyncConnection, AsyncEngine, create_async_engine  # noqa: E402

__all__ = ["AsyncConnection", "AsyncEngine", "create_async_engine"]
