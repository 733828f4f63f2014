"""Looks after the rollouts: counts what this gateway sees of them, and takes the decisions that are due."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Final
from uuid import uuid4

from adapter_store.catalog import Version
from adapter_store.comparison import Finding
from adapter_store.errors import AdapterStoreError
from adapter_store.ids import TenantId, VersionId
from adapter_store.rollouts import Rollout, Rollouts, Status, Tally

log = logging.getLogger("tailor.rollouts")
EVERY_S: Final = 1.0
Compare = Callable[[Rollout], Awaitable[Finding]]
"""What the proofs of a rollout's two versions have come to."""
UNASKED: Final = Finding(not_compared="needs_proof is false")


class RolloutWatch:
    """One gateway's part in all rollouts that are running. Any number of gateways may look after the same ones."""

    def __init__(
        self,
        rollouts: Rollouts,
        *,
        compare: Compare,
        on_moved: Callable[[TenantId], None],
        every_s: float = EVERY_S,
    ) -> None:
        """`on_moved(tenant)`: an alias of that tenant's was moved by this gateway."""
        self._rollouts = rollouts
        self._compare = compare
        self._on_moved = on_moved
        self._every_s = every_s
        self._gateway = uuid4().hex
        self.running = 0
        self.ended: Counter[str] = Counter()
        self._tallies: dict[tuple[str, VersionId], Tally] = {}
        self._changed: set[tuple[str, VersionId]] = set()

    def note(self, version: Version, *, failed: bool, latency_s: float | None = None) -> None:
        """One request of a version that an alias with a rollout led to."""
        assert version.rollout is not None
        key = (version.rollout, version.id)
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = Tally()
        tally.note(failed=failed, latency_s=latency_s)
        self._changed.add(key)

    async def follow(self) -> None:
        """Look at all of them, over and over; meant to run as one task."""
        while True:
            await asyncio.sleep(self._every_s)
            try:
                await self.look()
            except AdapterStoreError as error:
                log.warning("rollouts wait: %s", type(error).__name__)
            except Exception:  # looking must never end: a bad version would stay
                log.exception("rollouts could not be looked after")

    async def look(self) -> None:
        """Write down what was seen, and take what decisions are due."""
        running = await self._rollouts.running()
        self.running = len(running)
        ids = {rollout.id for rollout in running}
        for key in [key for key in self._tallies if key[0] not in ids]:
            del self._tallies[key]
            self._changed.discard(key)
        changed, self._changed = self._changed, set()
        if changed:
            try:
                await self._rollouts.keep(self._gateway, {key: self._tallies[key] for key in changed})
            except AdapterStoreError:
                self._changed |= changed
                raise
        for rollout in running:
            finding = await self._compare(rollout) if rollout.policy.needs_proof else UNASKED
            moved = await self._rollouts.advance(rollout, proof=finding.proof, remark=finding.remark)
            if moved is not None:
                self._tell(moved)

    def _tell(self, moved: Rollout) -> None:
        self._on_moved(moved.tenant_id)
        if moved.status is Status.RUNNING:
            log.info("rollout %s of tenant %s goes on to %d %%", moved.id, moved.tenant_id, moved.percent)
            return
        log.warning("rollout %s of tenant %s is over: %s", moved.id, moved.tenant_id, moved.status.value)
        self.ended[moved.status.value] += 1
