"""What is put under load: a server that runs somewhere, or a stack that is started here for the run alone.

| kind | what |
| --- | --- |
| `url` | any Tailor, by its address and an operator's key |
| `fake` | a real gateway in front of fake replicas: slots, LRU, load cost and queue without a model |
| `cpu` | `tailor up` with real vLLM replicas on this machine's CPU and a tiny base |
"""

import asyncio
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import httpx

from loadtests.children import Child, StackFailed
from loadtests.folders import own_folder
from loadtests.overhead.stack import free_port
from loadtests.scenario import Action, ActionKind, StackSettings

LOOK_S: Final = 0.05
OVER_HTTP: Final = frozenset(
    {
        ActionKind.UPLOAD,
        ActionKind.PUBLISH,
        ActionKind.FLIP,
        ActionKind.DELETE,
        ActionKind.ROTATE_KEY,
        ActionKind.COMMAND,
    }
)
"""What can be done to any server."""
QUIET: Final = {"TAILOR_LOG_LEVEL": "WARNING", "TAILOR_PROOF": "off"}
"""Proofs would load adapters beside those that are asked."""


class Target(Protocol):
    """A server under load."""

    kind: str
    url: str
    operator_key: str
    metrics_url: str  # empty where it is not known
    can: frozenset[ActionKind]
    slots: int  # max_loras of a replica; 0 where it is not known

    async def disturb(self, action: Action) -> None:
        """Do to a replica, or all, what the action says, and return when it is over."""


@dataclass(slots=True)
class UrlTarget:
    """A server that somebody else runs; its replicas are theirs."""

    url: str
    operator_key: str
    metrics_url: str = ""
    can: frozenset[ActionKind] = OVER_HTTP | {ActionKind.TRAIN}
    kind: str = "url"
    slots: int = 0

    async def disturb(self, action: Action) -> None:
        """Never: it is not among what can be done."""
        raise StackFailed(f"{action.kind} cannot be done to {self.url}")


@contextmanager
def own_home(logs: Path) -> Iterator[Path]:
    """A folder for a stack's keys, database and blobs, which goes with it; the logs in it are kept in `logs`.

    Results are handed on, by CI for one: no key may be among them.
    """
    with own_folder() as home:
        try:
            yield home
        finally:
            if (home / "logs").is_dir():
                shutil.copytree(home / "logs", logs, dirs_exist_ok=True)


def environment(home: Path, base: Path, settings: StackSettings) -> dict[str, str]:
    """Of a stack with a home of its own; a developer's own settings are left out."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("TAILOR_", "OTEL_"))}
    return ours | {
        "TAILOR_HOME": str(home),
        "TAILOR_BASE_MODEL": str(base),
        "TAILOR_BASE_MODEL_NAME": base.name,
        "TAILOR_PORT": str(free_port()),
        "TAILOR_OPERATOR_PORT": str(free_port()),
        **QUIET,
    }


def addresses(env: Mapping[str, str]) -> tuple[str, str]:
    """The gateway's, and that of its metrics."""
    return f"http://127.0.0.1:{env['TAILOR_PORT']}", f"http://127.0.0.1:{env['TAILOR_OPERATOR_PORT']}/metrics"


async def until_ready(url: str, replicas: int, children: Sequence[Child], within_s: float) -> None:
    stop = time.monotonic() + within_s
    async with httpx.AsyncClient(timeout=5, trust_env=False) as http:
        while time.monotonic() < stop:
            for child in children:
                if child.process is not None and child.process.poll() is not None:
                    raise StackFailed(f"{' '.join(child.command)} has ended. Its last words:\n{child.last_words()}")
            try:
                told = (await http.get(f"{url}/ready")).json()
                if told.get("database") and told.get("replicas_ready", 0) >= replicas:
                    return
            except (httpx.TransportError, ValueError):
                pass
            await asyncio.sleep(LOOK_S)
    raise StackFailed(f"{url} is not ready after {within_s:.0f} s. Its last words:\n{children[0].last_words()}")
