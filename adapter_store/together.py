"""What a caller writes in the store's own transaction, so that both are there or neither is."""

from typing import Generic, TypeVar

from adapter_store.engine import AsyncConnection

Made = TypeVar("Made")


class Together(Generic[Made]):
    """This one writes nothing. `besides_upload`: an upload that becomes what is made; its bytes do not count twice."""

    besides_upload: str | None = None

    async def before(self, connection: AsyncConnection) -> None:
        """Other writers wait, nothing is written yet; what this raises undoes the transaction."""

    async def after(self, connection: AsyncConnection, made: Made) -> None:
        """All is written but the commit."""
