"""Carries erasures to their end: blobs, then every replica, however long one is away, then the signed receipt.

Every gateway runs one `Eraser`, and each may do any step of any erasure; what two do at once is done once.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from adapter_store.changes import Change
from adapter_store.erasure import NOUN, Erasure, Erasures, Outcome, ReplicaPart, State
from adapter_store.errors import StorageError
from adapter_store.ids import TenantId
from gateway.replicas.client import CONTROL_ERRORS
from gateway.replicas.pool import ReplicaPool
from gateway.replicas.replica import Replica, ReplicaState

log = logging.getLogger("tailor.erasing")
AGAIN_S: Final = 1.0
"""Before the next try while something is pending (storage is away, requests run); doubled each time."""
MOST_S: Final = 16.0
ANSWER_S: Final = 5.0
DRAIN_S: Final = 10.0
"""Patience with an engine whose requests on the adapter run to their end, before others have a turn."""
ROUNDS: Final = 5
REQUEST_WAIT_S: Final = 5.0
"""How long the answer to who asks for an erasure waits for what goes at once."""
AT_ONCE: Final = 8


class Eraser:
    """`wait` gives a caller the erasure as far as it goes at once; the work goes on."""

    def __init__(self, erasures: Erasures, pool: ReplicaPool, *, clock: Callable[[], float] = time.time) -> None:
        self._erasures = erasures
        self._pool = pool
        self._clock = clock
        self._due = asyncio.Event()
        self._due.set()  # what an earlier process has left
        self._works: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._room = asyncio.Semaphore(AT_ONCE)
        self._ended: dict[str, asyncio.Event] = {}

    def wake(self) -> None:
        """There is something to do."""
        self._due.set()

    def on_change(self, change: Change) -> None:
        """A listener of the change feed: another gateway has taken an erasure, or completed one."""
        if change.noun == NOUN:
            self._due.set()

    async def wait(self, erasure: Erasure, patience_s: float) -> Erasure:
        """Returns when it is completed, or only replicas that are away are left, or after `patience_s`.

        Raises StorageUnavailable.
        """
        ended = self._ended.setdefault(erasure.id, asyncio.Event())
        self._due.set()
        try:
            async with asyncio.timeout(patience_s):
                await ended.wait()
        except TimeoutError:
            pass
        finally:
            self._ended.pop(erasure.id, None)
        return await self._erasures.find(erasure.tenant_id, erasure.id)

    async def follow(self) -> None:
        """Work for ever; meant to run as one task."""
        pending, again_s = False, AGAIN_S
        try:
            while True:
                try:
                    async with asyncio.timeout(again_s if pending else None):
                        await self._due.wait()
                    again_s = AGAIN_S
                except TimeoutError:
                    again_s = min(again_s * 2, MOST_S)
                self._due.clear()
                pending = await self._pass()
        finally:
            works = list(self._works.values())
            for work in works:
                work.cancel()
            await asyncio.gather(*works, return_exceptions=True)  # before the pool closes its connections

    async def _pass(self) -> bool:
        """One look at all that is unfinished; True where something has to be tried again."""
        waiting = dict(self._ended)  # those of erasures that this look cannot miss
        pending = False
        try:
            page = await self._erasures.unfinished()
            while page:
                for erasure in page:
                    if not await self._advance(erasure):
                        pending = True
                        if erasure.state is State.REQUESTED or self._works_on(erasure):
                            waiting.pop(erasure.id, None)
                page = await self._erasures.unfinished(after=page[-1].id)
        except StorageError as error:
            log.warning("erasures wait: %s", type(error).__name__)
            return True
        except Exception:  # erasing must never end
            log.exception("erasures could not be carried on")
            return True
        for ended in waiting.values():
            ended.set()
        return pending

    def _works_on(self, erasure: Erasure) -> bool:
        return any(erasure_id == erasure.id for erasure_id, _ in self._works)

    async def _advance(self, erasure: Erasure) -> bool:
        """As far as it goes just now; True where it is completed."""
        if erasure.state is State.REQUESTED:
            self._pool.forget(erasure.tenant_id, erasure.digests)
            try:
                await self._erasures.drop_blobs(erasure)
            except StorageError as error:  # another tenant's blobs may lie where there is an answer
                log.warning("the blobs of erasure %s wait: %s", erasure.id, type(error).__name__)
                return False
            self._due.set()
            return False
        self._begin_where_it_can(erasure)
        return not erasure.pending and (await self._erasures.complete(erasure.id)).state is State.COMPLETED

    def _begin_where_it_can(self, erasure: Erasure) -> None:
        replicas = {member.replica.id: member.replica for member in self._pool.members()}
        for name in erasure.pending:
            replica = replicas.get(name)
            if replica is None or replica.state is ReplicaState.UNREACHABLE:
                continue  # it is away: the pool tells when it is back
            if (erasure.id, name) not in self._works:
                self._begin(erasure, replica)

    def _begin(self, erasure: Erasure, replica: Replica) -> None:
        key = (erasure.id, replica.id)
        work = asyncio.create_task(self._erase(erasure, replica))
        self._works[key] = work

        def end(_: asyncio.Task[None]) -> None:
            del self._works[key]

        work.add_done_callback(end)

    async def _erase(self, erasure: Erasure, replica: Replica) -> None:
        """One replica's share; where it fails the next pass tries again."""
        try:
            async with self._room:
                part = await self._erase_from(erasure, replica)
            if part is None:
                return
            await self._erasures.confirm(erasure.id, part)
        except CONTROL_ERRORS as error:
            log.info("replica %s is still to erase for %s: %r", replica.id, erasure.id, error)
        except StorageError as error:
            log.warning("erasure %s waits: %s", erasure.id, type(error).__name__)
        except Exception:  # the next pass tries again
            log.exception("replica %s could not erase for %s", replica.id, erasure.id)
        else:
            self._due.set()

    async def _erase_from(self, erasure: Erasure, replica: Replica) -> ReplicaPart | None:
        """Out of the engine, then off the disk; None where something there is still in use."""
        again = await self._erasures.published_again(erasure.tenant_id, erasure.digests)
        others = await self._erasures.on_disk_for_others(erasure.tenant_id, erasure.digests)
        digests = set(erasure.digests) - again
        for _ in range(ROUNDS):
            replica.residency.forget_adapters(erasure.tenant_id, digests)
            if not await _unload(replica, erasure.tenant_id, digests):
                continue
            engine_gone_at = int(self._clock())
            if await _release(replica, digests - others):
                outcome = Outcome.PUBLISHED_AGAIN if again else Outcome.ERASED
                return ReplicaPart(replica.id, outcome, engine_gone_at, int(self._clock()), None)
        return None


async def _unload(replica: Replica, tenant_id: TenantId, digests: set[str]) -> bool:
    """Asks every name of them to leave, and waits for its requests; True where the report had none left."""
    report = await replica.client.state(ANSWER_S)
    names = [held.name for held in report.adapters if held.owner == tenant_id and held.digest in digests]
    for name in names:
        await replica.client.unload(name, DRAIN_S)
    return not names


async def _release(replica: Replica, digests: set[str]) -> bool:
    """Off the disk; False where the engine has been given one of them again meanwhile."""
    for digest in sorted(digests):
        if not await replica.client.release(digest, ANSWER_S):
            return False
    return True
