"""What requests have used whose answers were cut before they said it: asked of their replica, in the background.

A stream of `/v1/responses` or `/v1/messages` tells its use at its end alone, an answer that nobody waits for tells
nothing. Those that are cut together are one call. An engine hears within milliseconds that nobody reads on; one that
does not say in `WAIT_S` what it has counted is waited for no longer.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

import msgspec

from gateway.replicas.client import CONTROL_ERRORS, AgentRefusedError, ReplicaClient, RequestUse, UsageReport
from gateway.tokens import PromptDetails, Usage

log = logging.getLogger("tailor.replica")
WAIT_S: Final = 2.0
FIRST_S: Final = 0.02
AGAIN_S: Final = 0.1
CALL_S: Final = 1.0
MOST_AT_ONCE: Final = 1_024

Then = Callable[[Usage | None], None]
"""Takes the engine's count; None: there is none to be had."""


class Unheard:
    """Of one replica. Whoever asks is told once, at the latest when this is closed."""

    def __init__(self, client: ReplicaClient, *, wait_s: float = WAIT_S) -> None:
        self._client = client
        self._wait_s = wait_s
        self._waiting: dict[str, tuple[float, Then]] = {}  # until when
        self._task: asyncio.Task[None] | None = None
        self._is_closed = False

    def ask(self, request_id: str, then: Then) -> None:
        """Have `then` told what the request has used that was sent with this id, now or soon."""
        if self._is_closed:
            then(None)
            return
        self._waiting[request_id] = (time.monotonic() + self._wait_s, then)
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._ask_all())

    def close(self) -> None:
        """Nobody is asked any more; who waits is told so."""
        self._is_closed = True
        if self._task is not None:
            self._task.cancel()
        self._give_up(list(self._waiting))

    async def _ask_all(self) -> None:
        """Until nobody waits."""
        pause_s = FIRST_S
        try:
            while self._waiting:
                await asyncio.sleep(pause_s)
                pause_s = AGAIN_S
                asked = list(self._waiting)[:MOST_AT_ONCE]
                report = await self._report(asked)
                if report is not None:
                    self._take_in(asked, report)
                now = time.monotonic()
                self._give_up([name for name, (until, _) in self._waiting.items() if until <= now])
        except Exception:  # whatever it is, those who wait must not wait for ever
            log.exception("a replica cannot be asked for the use of requests")
            self._give_up(list(self._waiting))
        finally:
            self._task = None

    async def _report(self, asked: list[str]) -> UsageReport | None:
        """None: it may say it later."""
        try:
            return await self._client.used(asked, CALL_S)
        except (AgentRefusedError, msgspec.DecodeError):  # an agent that knows no such call
            return UsageReport({}, set())
        except CONTROL_ERRORS:
            return None

    def _take_in(self, asked: list[str], report: UsageReport) -> None:
        for name in asked:
            use = report.ended.get(name)
            if use is not None:
                self._tell(name, _counted(use))
            elif name not in report.running:
                self._tell(name, None)

    def _give_up(self, names: list[str]) -> None:
        for name in names:
            self._tell(name, None)

    def _tell(self, name: str, usage: Usage | None) -> None:
        waiting = self._waiting.pop(name, None)
        if waiting is not None:
            waiting[1](usage)


def _counted(use: RequestUse) -> Usage:
    return Usage(use.prompt_tokens, use.completion_tokens, PromptDetails(use.cached_tokens))
