"""Runs the check of a training file in a child process of its own, so that hostile bytes are never parsed beside keys.

Each check has a new process, which has no secrets in its environment, cannot write content, and ends with its work: one
that grew large gives its memory back. A tenant has one at a time. Small files have places of their own, for a large one
takes minutes (about a second for each MB).
"""

import asyncio
import json
import os
import sys
from asyncio.subprocess import DEVNULL, PIPE
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

from adapter_store.ids import TenantId
from adapter_store.inspector import PASSED_ENVIRONMENT
from training.errors import FileInvalid, LineFault, TooManyChecks

SMALL_BYTES: Final = 4 << 20
SMALL_AT_ONCE: Final = 2
LARGE_AT_ONCE: Final = 1
REPLY_LIMIT_BYTES: Final = 1 << 20
NO_VERDICT: Final = "it could not be checked: {}; split it, or ask your operator"


class FileCheck:
    """`base`: the folder whose tokenizer counts; None, or one without it: nothing counts tokens."""

    def __init__(
        self,
        base: Path | None,
        *,
        max_length: int | None = None,
        timeout_s: float = 900.0,
        small_bytes: int = SMALL_BYTES,
    ) -> None:
        self._base = base
        self._small_bytes = small_bytes
        self._max_length = max_length
        self._timeout_s = timeout_s
        self._patience_s = timeout_s
        self._small = asyncio.Semaphore(SMALL_AT_ONCE)
        self._large = asyncio.Semaphore(LARGE_AT_ONCE)
        self._tenants: dict[TenantId, tuple[asyncio.Lock, int]] = {}

    async def run(self, tenant_id: TenantId, path: Path, size_bytes: int) -> dict[str, Any]:
        """What was found: method, statistics, warnings. Raises FileInvalid, TooManyChecks."""
        places = self._small if size_bytes <= self._small_bytes else self._large
        async with self._turn(tenant_id, places):
            reply = await self._ask(path)
        faults = [LineFault(fault["line"], fault["reason"]) for fault in reply.pop("faults")]
        if faults:
            raise FileInvalid(faults, complete=reply["complete"])
        return reply

    @asynccontextmanager
    async def _turn(self, tenant_id: TenantId, places: asyncio.Semaphore) -> AsyncIterator[None]:
        """A tenant's checks wait for one another before they wait for a place, no longer than one may take.

        Raises TooManyChecks.
        """
        lock, users = self._tenants.get(tenant_id, (asyncio.Lock(), 0))
        self._tenants[tenant_id] = lock, users + 1
        try:
            async with AsyncExitStack() as held:
                try:
                    async with asyncio.timeout(self._patience_s):
                        await held.enter_async_context(lock)
                        await held.enter_async_context(places)
                except TimeoutError:
                    raise TooManyChecks from None
                yield
        finally:
            lock, users = self._tenants.pop(tenant_id)
            if users > 1:
                self._tenants[tenant_id] = lock, users - 1

    async def _ask(self, path: Path) -> dict[str, Any]:
        command = (sys.executable, "-P", "-m", "training.file_check_worker")
        environment = {name: os.environ[name] for name in PASSED_ENVIRONMENT if name in os.environ}
        environment |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
        setup = {
            "path": str(path),
            "base": None if self._base is None else str(self._base),
            "max_length": self._max_length,
            "timeout_s": self._timeout_s,
        }
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL, env=environment, limit=REPLY_LIMIT_BYTES
        )
        try:
            async with asyncio.timeout(self._timeout_s + 5):
                told, _ = await process.communicate(json.dumps(setup).encode() + b"\n")
        except TimeoutError:
            raise _no_verdict("it took too long") from None
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
        try:
            reply: dict[str, Any] = json.loads(told)
        except ValueError:
            raise _no_verdict("it took too long, or too much memory") from None
        return reply


def _no_verdict(reason: str) -> FileInvalid:
    return FileInvalid([LineFault(0, NO_VERDICT.format(reason))])
