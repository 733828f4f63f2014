"""The child process that reads strangers' training files: one JSON line in, one out. Started by `file_check.py`.

It cannot write files, holds at most MEMORY_BYTES, takes no more processor time than it was given, and gives way to
everything else on the machine.
"""

import json
import os
import resource
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from adapter_store.process import die_with_parent
from training.datafile import check, chunks, load_tokenizer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MEMORY_BYTES = 2 << 30  # address space
NICENESS = 10


def main() -> None:
    die_with_parent()
    setup = json.loads(sys.stdin.readline())
    os.nice(NICENESS)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_REAL, setup["timeout_s"])  # the default action of SIGALRM ends the process
    base = None if setup["base"] is None else Path(setup["base"])
    tokenizer, context = (None, None) if base is None else (_tokenizer_of(base), _context_of(base))
    with Path(setup["path"]).open("rb") as file:
        report = check(chunks(file), tokenizer=tokenizer, max_length=setup["max_length"] or context)
    sys.stdout.write(json.dumps(asdict(report)) + "\n")


def _tokenizer_of(base: Path) -> "Tokenizer | None":
    """None where the base has none that the library reads: no tenant's file is refused for that."""
    try:
        return load_tokenizer(base)
    except Exception:  # noqa: BLE001  the library raises nothing more special
        return None


def _context_of(base: Path) -> int | None:
    """How many tokens the base reads at once, where its configuration says so."""
    length = json.loads((base / "config.json").read_bytes()).get("max_position_embeddings")
    return length if isinstance(length, int) else None


if __name__ == "__main__":
    main()
