"""Modules that are in place, and run when somebody asks for something in them.

For what a dependency imports and this process does not use. Submodules can be imported as ever, without running it.
`importlib.util.LazyLoader` is no help: it takes every access for a first use, that to `__path__` for a submodule too,
and that of whoever looks through all modules for their files.
"""

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from threading import RLock
from types import ModuleType
from typing import Any


def import_when_used(name: str) -> None:
    """Put the module in place, its code not run yet; nothing where somebody has imported it, or where it is not."""
    spec = None if name in sys.modules else find_spec(name)
    if spec is None:
        return
    module = _Unrun(name)
    made = module_from_spec(spec)  # with every attribute that a module of this spec has
    module.__dict__.update({name: value for name, value in vars(made).items() if name.startswith("__")})
    sys.modules[name] = module
    parent, _, own = name.rpartition(".")
    if parent:
        setattr(import_module(parent), own, module)  # as the import system does after an init


class _Unrun(ModuleType):
    """Runs when a name is asked for that is neither there nor a submodule's."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._running = RLock()
        self._begun = False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        if "__path__" in self.__dict__ and find_spec(f"{self.__name__}.{name}"):
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
                try:
                    self.__spec__.loader.exec_module(self)
                except BaseException:
                    self._begun = False  # who asks next is told the same, not that a name is missing
                    raise
