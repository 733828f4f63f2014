"""Runs inspections in a warm child process, so that hostile files are never parsed in the gateway's own."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import msgspec

from adapter_store.base_model import BaseModel
from adapter_store.faults import Bounds, Fault, FaultCode, Inspection

REPLY_LIMIT_BYTES = 8 << 20  # faults have at most half a MiB of text, which JSON may escape twelvefold
# What Python needs to start, and nothing else: no secret of the gateway's environment reaches the child.
PASSED_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "LANG", "TZ")


class Reply(msgspec.Struct):
    """A line from the worker."""

    faults: tuple[Fault, ...]
    config: str
    rank: int
    modules: tuple[str, ...]


class Inspector:
    """One inspection at a time; the child starts with the first and is replaced when it dies or hangs."""

    def __init__(self, base: BaseModel, bounds: Bounds, *, timeout_s: float = 60.0) -> None:
        self.base = base
        self.bounds = bounds
        self.timeout_s = timeout_s
        self._process: Process | None = None
        self._lock = asyncio.Lock()
        self._replies = msgspec.json.Decoder(Reply)

    @property
    def pid(self) -> int | None:
        return None if self._process is None else self._process.pid

    async def inspect(self, folder: Path) -> Inspection:
        """The verdict on `folder`: one fault `inspection_failed` where the child died or was too slow."""
        async with self._lock:
            try:
                reply = await asyncio.wait_for(self._ask(folder), self.timeout_s)
            except (TimeoutError, OSError, EOFError, ValueError) as error:  # a line too long or no reply
                await self._stop()
                return _failed("it took too long" if isinstance(error, TimeoutError) else "it broke off")
            except BaseException:  # cancelled: the answer that is still to come would be taken for the next one's
                await self._stop()
                raise
        return Inspection(reply.faults, reply.config.encode(), reply.rank, reply.modules)

    async def close(self) -> None:
        async with self._lock:
            await self._stop()

    async def _ask(self, folder: Path) -> Reply:
        if self._process is None or self._process.returncode is not None:
            self._process = await self._start()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(_line({"folder": str(folder)}))
        await self._process.stdin.drain()
        line = await self._process.stdout.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        return self._replies.decode(line)

    async def _start(self) -> Process:
        command = (sys.executable, "-P", "-m", "adapter_store.inspection_worker")
        environment = {name: os.environ[name] for name in PASSED_ENVIRONMENT if name in os.environ}
        environment["OPENBLAS_NUM_THREADS"] = "1"
        process = await asyncio.create_subprocess_exec(
            *command, stdin=PIPE, stdout=PIPE, env=environment, limit=REPLY_LIMIT_BYTES
        )
        assert process.stdin is not None
        setup = {"base": self.base.to_json(), "bounds": asdict(self.bounds), "timeout_s": self.timeout_s}
        process.stdin.write(_line(setup))
        return process

    async def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if process.stdin is not None:
            process.stdin.close()


def _line(message: dict[str, object]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _failed(reason: str) -> Inspection:
    hint = "try again; if it fails again, save the adapter anew with PEFT's save_pretrained"
    fault = Fault(FaultCode.INSPECTION_FAILED, "adapter", None, None, f"no verdict: {reason}", "a verdict", hint)
    return Inspection((fault,))
