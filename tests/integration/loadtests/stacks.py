"""Stacks of fake replicas for tests, each started once and shared by the scenarios that ask for the same."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from loadtests.fake_stack import FakeStack, fake_stack
from loadtests.scenario import StackSettings


class Stacks:
    """Running stacks by their settings."""

    def __init__(self, folder: Path, held: AsyncExitStack) -> None:
        self._folder, self._held = folder, held
        self._stacks: dict[str, FakeStack] = {}

    async def stack(self, settings: StackSettings, *, base: Path | None = None) -> FakeStack:
        """One with these settings."""
        key = settings.model_dump_json()
        if key not in self._stacks:
            folder = self._folder / f"stack-{len(self._stacks)}"
            self._stacks[key] = await self._held.enter_async_context(fake_stack(settings, folder, base=base))
        return self._stacks[key]


@asynccontextmanager
async def shared_stacks(folder: Path) -> AsyncIterator[Stacks]:
    """Until the block ends."""
    async with AsyncExitStack() as held:
        yield Stacks(folder, held)
    await asyncio.sleep(0)
