"""SQLAlchemy's asynchronous engine, without its ORM; the one module that imports `sqlalchemy.ext.asyncio`.

That package's init imports `session` and `scoping`, and with them `sqlalchemy.orm`: 6 MiB in every process, for classes
that nobody here uses. So the package is put in place with its init not run yet. Its submodules can be imported as ever,
and the init runs as soon as any other name is asked of it: `from sqlalchemy.ext.asyncio import AsyncSession` works in
other code of the process, before this module and after it.

`importlib.util.LazyLoader` is no help: it takes every access for a first use, that to `__path__` for a submodule too.
"""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from threading import RLock
from types import ModuleType
from typing import Any, Final

PACKAGE: Final = "sqlalchemy.ext.asyncio"


class _Unrun(ModuleType):
    """A package whose init runs when a name is asked for that is neither there nor a submodule's."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._running = RLock()
        self._begun = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if find_spec(f"{self.__name__}.{name}"):
            return import_module(f"{self.__name__}.{name}")
        self._run()
        return super().__getattribute__(name)

    def __dir__(self) -> list[str]:
        self._run()
        return sorted(self.__dict__)

    def _run(self) -> None:
        with self._running:  # another thread finds the init done, its own code finds it begun
            if not self._begun and self.__spec__ and self.__spec__.loader:
                self._begun = True
                self.__spec__.loader.exec_module(self)


def _put_in_place() -> None:
    spec = None if PACKAGE in sys.modules else find_spec(PACKAGE)
    if spec is None:  # whoever imported it has run the init already
        return
    package = _Unrun(PACKAGE)
    made = module_from_spec(spec)  # with every attribute that a module of this spec has
    package.__dict__.update({name: value for name, value in vars(made).items() if name.startswith("__")})
    sys.modules[PACKAGE] = package
    parent, _, name = PACKAGE.rpartition(".")
    setattr(import_module(parent), name, package)  # as the import system does after an init


_put_in_place()

from sqlalchemy.ext.asyncio.engine import AsyncConnection, AsyncEngine, create_async_engine  # noqa: E402

__all__ = ["AsyncConnection", "AsyncEngine", "create_async_engine"]
