"""Pure: in which order replicas are tried for an adapter."""

from collections.abc import Iterable
from hashlib import blake2b


def rendezvous(replicas: Iterable[str], adapter: str) -> list[str]:
    """Replica ids in the adapter's own stable order (highest random weight, Thaler and Ravishankar 1998).

    When a replica leaves, only its own adapters move.
    """
    return sorted(
        replicas,
        key=lambda replica: blake2b(f"{replica}\0{adapter}".encode(), digest_size=8).digest(),
        reverse=True,
    )
