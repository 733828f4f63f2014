"""The hot modules in compiled form: the same source, translated to C by mypyc (`make compile`).

A request passes through some hundred small functions; compiled, it costs a quarter less (docs/benchmarks.md). Nothing
else changes: where there is no compiled form, or it was made of other source, the interpreter runs the source.
"""

import os
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from hashlib import sha256
from importlib.abc import MetaPathFinder
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Final

HOT: Final = (
    "gateway.api.generation",
    "gateway.api_key",
    "gateway.auth",
    "gateway.batches",
    "gateway.dialects.chat",
    "gateway.dialects.dialect",
    "gateway.dialects.messages",
    "gateway.dialects.words",
    "gateway.fairness",
    "gateway.fresh_cache",
    "gateway.freshness",
    "gateway.journal",
    "gateway.limits.memory",
    "gateway.limits.terms",
    "gateway.models",
    "gateway.open_set",
    "gateway.protocol",
    "gateway.relay",
    "gateway.replicas.breaker",
    "gateway.replicas.holdings",
    "gateway.replicas.pool",
    "gateway.replicas.replica",
    "gateway.replicas.turns",
    "gateway.replicas.upstream",
    "gateway.request_ids",
    "gateway.routing",
    "gateway.telemetry.counting",
    "gateway.telemetry.observation",
    "gateway.telemetry.series",
)
"""What a generation request passes through; not what is mostly about other things, for code takes memory too."""
GROUP: Final = "tailor"
SHARED: Final = f"{GROUP}__mypyc"
"""The one library that holds all code; the modules' own files only point into it."""
PACKAGES: Final = ("gateway", "adapter_store")
ROOT: Final = Path(__file__).parent.parent
FOLDER: Final = Path(sysconfig.get_path("platlib")) / "tailor_compiled"
MADE_OF: Final = FOLDER / "made-of"
INTERPRETED: Final = "TAILOR_INTERPRETED"
"""Set to 1, the environment variable keeps to the interpreter."""


def source_of(name: str) -> Path:
    """The file of a hot module."""
    return ROOT / f"{name.replace('.', '/')}.py"


def digest(root: Path = ROOT) -> str:
    """Of all source that the translation has looked at: it holds constants of other modules. And of the interpreter."""
    known = sha256(sys.version.encode())
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            known.update(f"{file.relative_to(root)}\0".encode())
            known.update(file.read_bytes())
    return known.hexdigest()


def files() -> dict[str, Path]:
    """Where the compiled modules belong, by name."""
    suffix = EXTENSION_SUFFIXES[0]
    found = {name: FOLDER / f"{name.replace('.', '/')}{suffix}" for name in HOT}
    found[SHARED] = FOLDER / f"{SHARED}{suffix}"
    return found


def is_made_of(source: str) -> bool:
    """Whether all compiled modules are there, made of the source of that digest."""
    return MADE_OF.exists() and MADE_OF.read_text() == source and all(file.exists() for file in files().values())


def state() -> str:
    """What runs here: "compiled", "interpreted", or "interpreted: it was compiled of other source"."""
    if _FINDER in sys.meta_path:
        return "compiled"
    return "interpreted: it was compiled of other source" if _is_wanted() else "interpreted"


def _is_wanted() -> bool:
    return MADE_OF.exists() and os.environ.get(INTERPRETED, "0") == "0"


def use() -> None:
    """Have the hot modules imported in compiled form, where that is there and of this very source."""
    if not _is_wanted() or _FINDER in sys.meta_path:
        return
    if is_made_of(digest()):
        _FINDER.files = files()
        sys.meta_path.insert(0, _FINDER)


class _Finder(MetaPathFinder):
    """Finds the compiled modules before the path's finder finds their source."""

    files: Mapping[str, Path] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        file = self.files.get(fullname)
        return None if file is None else spec_from_file_location(fullname, file)


_FINDER: Final = _Finder()
