"""`python -m loadtests.store`: the adapter store's figures, from an upload to the first token.

Prints one JSON object a line for each figure and ends with 1 where a must is missed, with 2 where one could not be
measured. Nothing else should run on the machine; where it does, trust CPU more than seconds.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtests.figures import Row, add_files, exit_code, tell, write
from loadtests.overhead.processes import machine, niceness
from loadtests.overhead.stack import CannotMeasureError
from loadtests.store import catalog, programs
from loadtests.store.catalog import catalog_rows
from loadtests.store.first_token import build_base, first_token_row, s3
from loadtests.store.inspection import inspection_row
from loadtests.store.upload import upload_rows

PARTS: Final = ("catalog", "upload", "inspection", "first-token", "first-token-s3")
FOLDER: Final = Path(".tailor/bench")
"""On a disk: a temporary folder may be in memory, where fsync costs nothing."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured: `large_bytes` of an upload, `uploads` to a first token each."""

    catalog: catalog.Effort
    large_bytes: int
    uploads: int


QUICK: Final = Effort(catalog.QUICK, 100_000_000, uploads=3)
FULL: Final = Effort(catalog.FULL, 2_000_000_000, uploads=20)


def main() -> int:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started ends with us
    args.folder.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    try:
        with ExitStack() as held:
            if args.nice:
                held.enter_context(niceness(args.nice))
            folder = tempfile.TemporaryDirectory(dir=args.folder.absolute(), ignore_cleanup_errors=True)
            for one in measure(args, QUICK if args.quick else FULL, Path(held.enter_context(folder))):
                tell([one])
                rows.append(one)
    except CannotMeasureError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    write(rows, args, {"machine": machine()})
    return exit_code(rows)


def measure(args: argparse.Namespace, effort: Effort, folder: Path) -> Iterator[Row]:
    """The figures, as they come.

    Raises:
        CannotMeasureError: something is missing or does not start.
    """
    if "inspection" in args.only:
        yield inspection_row()
    if "catalog" in args.only:
        with ExitStack() as held:
            url = held.enter_context(programs.running("tests.bench.postgres")).hear()["url"] if args.postgres else None
            yield from catalog_rows(folder / "catalog", effort.catalog, url)
    if "upload" in args.only:
        yield from upload_rows(folder, effort.large_bytes)
    if {"first-token", "first-token-s3"} & set(args.only):
        yield from first_token_rows(args, folder, args.uploads or effort.uploads)


def first_token_rows(args: argparse.Namespace, folder: Path, uploads: int) -> Iterator[Row]:
    """On a folder, and from S3."""
    base = build_base(folder)
    if "first-token" in args.only:
        yield first_token_row("first_token_p95_s", folder / "stack", base, uploads, {})
    if "first-token-s3" in args.only:
        with s3(folder / "s3") as settings:
            yield first_token_row("first_token_s3_p95_s", folder / "stack-s3", base, uploads, settings)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.store", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small sizes: for a look, not for a record")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts alone")
    parser.add_argument("--uploads", type=int, help="so many to a first token each, instead of 20")
    parser.add_argument("--postgres", action="store_true", help="the catalogue in PostgreSQL instead of SQLite")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where all files go; default: %(default)s")
    parser.add_argument("--nice", type=int, default=0, help="niceness of all that is measured; below 0 asks for root")
    add_files(parser)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
