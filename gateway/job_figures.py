"""How long the queue of fine-tuning jobs is, looked at now and then for the metrics page."""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from adapter_store.errors import StorageError
from training.jobs import Jobs

log = logging.getLogger("tailor.jobs")
LOOK_EVERY_S: Final = 5.0


class JobFigures:
    """Of all tenants' jobs, as they were when they were last looked at."""

    def __init__(self, jobs: Jobs, *, clock: Callable[[], float] = time.time) -> None:
        self.queued = 0
        self.running = 0
        self._jobs = jobs
        self._clock = clock
        self._since: int | None = None

    @property
    def oldest_age_s(self) -> float:
        """How long the job has waited that has waited longest; 0: none waits."""
        return 0.0 if self._since is None else max(0.0, self._clock() - self._since)

    async def look(self) -> None:
        """Raises StorageUnavailable."""
        self.queued, self.running, self._since = await self._jobs.figures()

    async def follow(self) -> None:
        """Look, for ever; meant to run as one task."""
        while True:
            try:
                await self.look()
            except StorageError as error:
                log.warning("the queue of jobs was not looked at: %s", error)
            except Exception:  # looking must never end
                log.exception("the queue of jobs was not looked at")
            await asyncio.sleep(LOOK_EVERY_S)
