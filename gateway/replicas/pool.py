"""The replicas behind this gateway: who may be asked for an adapter, in which order."""

import asyncio
from collections.abc import Iterable, Sequence

from adapter_store.ids import TenantId
from gateway.errors import ReplicaUnavailable
from gateway.replicas.replica import Replica, ReplicaState
from gateway.routing import rendezvous

RETRY_AFTER_S = 5


class ReplicaPool:
    """All replicas, watched while the pool runs."""

    def __init__(self, replicas: Iterable[Replica]) -> None:
        self._replicas = {replica.id: replica for replica in replicas}
        self._watches: list[asyncio.Task[None]] = []

    def start(self) -> None:
        self._watches = [asyncio.create_task(replica.watch()) for replica in self._replicas.values()]

    async def stop(self) -> None:
        for watch in self._watches:
            watch.cancel()
        await asyncio.gather(*self._watches, return_exceptions=True)
        for replica in self._replicas.values():
            replica.client.upstream.close()

    def states(self) -> dict[str, ReplicaState]:
        return {replica.id: replica.state for replica in self._replicas.values()}

    def choose(self, adapter: str, *, tried: Sequence[Replica] = ()) -> Replica:
        """The ready replica that comes first for this adapter and has not been tried.

        Raises:
            ReplicaUnavailable: there is none.
        """
        ready = [
            replica.id
            for replica in self._replicas.values()
            if replica.state is ReplicaState.READY and replica not in tried
        ]
        if not ready:
            raise ReplicaUnavailable(
                "No engine is ready to answer just now; try again shortly.", retry_after_s=RETRY_AFTER_S
            )
        return self._replicas[ready[0] if len(ready) == 1 else rendezvous(ready, adapter)[0]]

    async def unload(self, tenant_id: TenantId, digests: Sequence[str]) -> None:
        """Take deleted versions out of every replica."""
        await asyncio.gather(*(replica.residency.unload(tenant_id, digests) for replica in self._replicas.values()))
