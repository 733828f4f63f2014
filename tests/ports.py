"""Ports for processes that tests start."""

import os
from typing import Final

from loadtests.ports import Ports

FIRST: Final = 10_000
EACH: Final = 2_000  # for each process that tests run in
_WORKER: Final = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 10

free_port: Final = Ports(range(FIRST + _WORKER * EACH, FIRST + (_WORKER + 1) * EACH)).free
