"""What one replica holds, as requests look it up; how it comes and goes is `gateway.replicas.residency`'s.

A module of its own, because it is compiled.
"""

import time

from adapter_store.catalog import Version
from gateway.journal import Meter
from gateway.open_set import Key


class Resident:
    """A version in the engine under its once-used name.

    `tier` and `in_flight` (requests of all gateways) are as of the last report; `last_used` is in Unix seconds,
    `loaded_at` in monotonic ones. `receipt` are the header lines that name `version`, and `meter` is where its requests
    are counted, once one has needed them.
    """

    __slots__ = ("in_flight", "key", "last_used", "loaded_at", "meter", "name", "receipt", "tier", "version")

    def __init__(
        self,
        key: Key,
        name: str,
        version: Version | None,
        last_used: float,
        *,
        loaded_at: float = 0.0,
        tier: str = "gpu",
    ) -> None:
        self.key = key
        self.name = name
        self.version = version
        self.last_used = last_used
        self.loaded_at = loaded_at
        self.tier = tier
        self.in_flight = 0
        self.receipt = b""
        self.meter: Meter | None = None


class Holdings:
    """Residents by (tenant, digest)."""

    __slots__ = ("by_key",)

    def __init__(self) -> None:
        self.by_key: dict[Key, Resident] = {}

    def use(self, key: Key, version: Version) -> Resident | None:
        """The resident, used from now on by the names of `version`; None where it must be loaded first."""
        resident = self.by_key.get(key)
        if resident is not None:
            resident.last_used = time.time()
            if resident.version is not version:
                resident.version = version
                resident.receipt = b""
                resident.meter = None
        return resident
