"""Makes the compiled form of the hot modules: `python -m gateway.compile [--if-possible]`.

It needs a C compiler and Python's headers. With `--if-possible` a machine without them is told what it lacks, and that
is no failure.
"""

import os
import shutil
import sys
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Final

from gateway.compiled import FOLDER, GROUP, HOT, INTERPRETED, MADE_OF, ROOT, digest, files, is_made_of, source_of

# Of others, only the types of what a hot class inherits from are read: all are checked by `make lint`, slowly.
CONFIG: Final = """[mypy]
ignore_missing_imports = true
follow_imports = skip
[mypy-gateway.*,adapter_store.*,uvicorn.*]
follow_imports = silent
"""


def main() -> None:
    """Builds, or says why it cannot and ends with 1."""
    of = digest()
    if is_made_of(of):
        return
    lack = lacking()
    if lack is not None:
        sys.stderr.write(f"The hot path stays interpreted, at a third more CPU: {lack} is needed to compile it.\n")
        sys.exit(0 if "--if-possible" in sys.argv else 1)
    begin = time.monotonic()
    sys.stdout.write("compiling the hot path (two minutes, after each change of it)\n")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="tailor-compile-") as folder:
        built = build(Path(folder))
        install(built, of)
    sys.stdout.write(f"compiled in {time.monotonic() - begin:.0f} s\n")


def lacking() -> str | None:
    """What is missing on this machine."""
    compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
    if shutil.which(compiler) is None:
        return f"a C compiler ({compiler})"
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        return "Python.h (Debian's package python3-dev)"
    return None


def build(folder: Path) -> Path:
    """Translate and compile in an empty folder; where the libraries lie then."""
    from mypyc.build import mypycify
    from setuptools import setup

    config = folder / "mypy.ini"
    config.write_text(CONFIG)
    os.chdir(ROOT)
    sources = [str(source_of(name).relative_to(ROOT)) for name in HOT]
    extensions = mypycify(
        [f"--config-file={config}", f"--cache-dir={folder / 'cache'}", *sources],
        opt_level="2",
        debug_level="0",
        group_name=GROUP,
        target_dir=str(folder / "c"),
    )
    built = folder / "built"
    setup(
        name=GROUP,
        packages=[],
        py_modules=[],
        ext_modules=extensions,
        script_args=["-q", "build_ext", f"--build-lib={built}", f"--build-temp={folder / 'o'}"],
    )
    return built


def install(built: Path, of: str) -> None:
    """Put the libraries where `gateway.compiled` looks for them; what names their source comes last."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for file in files().values():
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built / file.relative_to(FOLDER), file)
    MADE_OF.write_text(of)


if __name__ == "__main__":
    os.environ[INTERPRETED] = "1"
    main()
