"""The child process that opens strangers' files: one JSON line in, one out. Started by `inspector.py`.

It cannot write files, holds at most MEMORY_BYTES, dies when a job takes too long, and ends with its parent
(its stdin closes).
"""

import json
import resource
import signal
import sys
from dataclasses import asdict
from pathlib import Path

from adapter_store import tensor_values  # noqa: F401 numpy maps its memory before the limit is set
from adapter_store.base_model import BaseModel
from adapter_store.faults import Bounds
from adapter_store.inspection import inspect

MEMORY_BYTES = 1 << 30  # address space, numpy's libraries included


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    setup = json.loads(sys.stdin.readline())
    base, bounds = BaseModel.from_json(setup["base"]), Bounds(**setup["bounds"])
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, setup["timeout_s"])  # the default action of SIGALRM ends the process
        inspection = inspect(Path(json.loads(line)["folder"]), base, bounds)
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply = {**asdict(inspection), "config": inspection.config.decode()}
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
