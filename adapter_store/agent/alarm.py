"""What NaN in an engine's answers, or its end, says about adapters; kept on disk for the next engine to tell.

Two alarms. `corrupted`: an answer was computed with NaN logits. Its adapter is known exactly, and whatever this engine
computes from here on may be wrong: NaN stays in freed KV blocks (`docs/vllm.md`). `engine_died`: the engine ended by
itself while this process lived. Suspects are the adapter whose load was under way, else those that were loaded just
now; where the engine before died too, those among them that were suspects then. For an engine
that was killed from outside (SIGKILL, SIGTERM) nobody is suspected.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal

import msgspec

from adapter_store.agent.residency import Residency, Whose

log = logging.getLogger("tailor.agent")
FILE = "alarm.json"
IN_A_ROW_S = 900.0


class Suspect(msgspec.Struct, frozen=True):
    """An adapter, as the gateway that loaded it named it."""

    owner: str
    digest: str


class Alarm(msgspec.Struct, frozen=True):
    """`at` in Unix seconds; `generation` of the engine that it is about."""

    generation: str
    at: float
    reason: Literal["corrupted", "engine_died"]
    suspects: tuple[Suspect, ...]


class Alarms:
    """This engine's alarm, once there is one, and the one before it. An alarm is raised once: the engine ends."""

    def __init__(
        self, folder: Path, generation: str, residency: Residency, *, clock: Callable[[], float] = time.time
    ) -> None:
        self._path = folder / FILE
        self._generation = generation
        self._residency = residency
        self._clock = clock
        self.before = _read(self._path)
        self.now: Alarm | None = None
        self.raised = asyncio.Event()
        self.heard = asyncio.Event()
        """A gateway has taken note."""

    def corrupted(self, names: Collection[str | None]) -> None:
        """The answers of these adapters (None: the base model's) in one engine step had NaN logits, the first ones."""
        if self.now is None:
            latest = self._residency.latest(name for name in names if name is not None)
            self._raise("corrupted", [latest] if latest is not None else [])

    def died(self, *, killed: bool) -> None:
        """The engine has ended; `killed` from outside, which is no adapter's doing."""
        if self.now is None:
            self._raise("engine_died", [] if killed else self._narrowed(self._residency.under_suspicion()))

    def _narrowed(self, suspects: list[Whose]) -> list[Whose]:
        before = self.before
        if before is None or before.reason != "engine_died" or self._clock() - before.at > IN_A_ROW_S:
            return suspects
        again = [whose for whose in suspects if Suspect(*whose) in before.suspects]
        return again or suspects

    def _raise(self, reason: Literal["corrupted", "engine_died"], suspects: list[Whose]) -> None:
        found = tuple(Suspect(*whose) for whose in suspects if whose[0])
        self.now = Alarm(self._generation, self._clock(), reason, found)
        self.raised.set()
        log.error("alarm %s in engine %s, suspects %s", reason, self._generation, found)
        try:
            partial = self._path.with_suffix(".partial")
            partial.write_bytes(msgspec.json.encode(self.now))
            partial.replace(self._path)
        except OSError:  # gateways that listen now hear it all the same
            log.exception("the alarm could not be written down")


def _read(path: Path) -> Alarm | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Alarm)
    except (OSError, msgspec.DecodeError):
        return None
