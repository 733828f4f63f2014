"""A real gateway in front of fake replicas, each a process, all on this machine."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from loadtests.api import Api, ServerRefused, ServerUnreachable
from loadtests.children import Child, StackFailed
from loadtests.fake.replica import TOKEN
from loadtests.overhead.model_files import write_base
from loadtests.overhead.stack import fingerprint_of, free_port
from loadtests.scenario import Action, ActionKind, StackSettings
from loadtests.stacks import LOOK_S, OVER_HTTP, addresses, environment, own_home, until_ready

START_S: Final = 60.0
DRAIN_S: Final = 30.0


@dataclass(slots=True)
class FakeStack:
    """A gateway in front of fake replicas."""

    url: str
    metrics_url: str
    operator_key: str
    gateway: Child
    replicas: list[Child]
    replica_urls: list[str]
    worker: Child | None = None
    slots: int = 0
    kind: str = "fake"
    can: frozenset[ActionKind] = OVER_HTTP | {
        ActionKind.KILL_REPLICA,
        ActionKind.STOP_REPLICA,
        ActionKind.SLOW_REPLICA,
        ActionKind.ROLLING_RESTART,
    }

    async def disturb(self, action: Action) -> None:
        """As the action says."""
        number = action.replica % len(self.replicas)
        child = self.replicas[number]
        if action.kind is ActionKind.KILL_REPLICA:
            child.kill()
            await asyncio.sleep(action.duration_s)
            child.start()
        elif action.kind is ActionKind.STOP_REPLICA:
            child.send(signal.SIGSTOP)
            await asyncio.sleep(action.duration_s)
            child.send(signal.SIGCONT)
        elif action.kind is ActionKind.SLOW_REPLICA:
            await self._slow(number, action)
        else:
            async with Api(self.url) as api:
                for each in range(len(self.replicas)):
                    await self._restart(api, each)

    async def _slow(self, number: int, action: Action) -> None:
        body = {"factor": action.factor, "duration_s": action.duration_s}
        async with Api(self.replica_urls[number]) as api:
            await api.call("", "POST", "/fake/slow", body)
        await asyncio.sleep(action.duration_s)

    async def _restart(self, api: Api, number: int) -> None:
        """As `tailor restart` does: drained first, and back before the next."""
        url, key = self.replica_urls[number], self.operator_key
        before = await _replica(api, key, url)
        await api.call(key, "POST", f"/admin/v1/replicas/{before['id']}/drain")
        await _until(api, key, url, DRAIN_S, lambda now: now["state"] != "draining")
        await self.replicas[number].stop()
        self.replicas[number].start()

        def is_back(now: Mapping[str, Any]) -> bool:
            return now["generation"] != before["generation"] and now["state"] in ("drained", "ready")

        await _until(api, key, url, START_S, is_back)
        await api.call(key, "POST", f"/admin/v1/replicas/{before['id']}/resume")

    def children(self) -> list[Child]:
        """The gateway first: it drains while its replicas still answer."""
        return [self.gateway, *([self.worker] if self.worker else []), *self.replicas]


@asynccontextmanager
async def fake_stack(
    settings: StackSettings, folder: Path, *, base: Path | None = None, more: Sequence[str] = ()
) -> AsyncIterator[FakeStack]:
    """A fake stack that answers, until the block ends; `more`: further arguments of `loadtests.fake`.

    Its logs are in `folder`, and its base where none is given.

    Raises:
        StackFailed: a process of it does not start.
    """
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    if base is None:
        base = await asyncio.to_thread(write_base, folder / "base")
    fingerprint = await asyncio.to_thread(fingerprint_of, base)
    ports = [free_port() for _ in range(settings.replicas)]
    replicas = [
        Child(
            [*_fake_command(settings, port, fingerprint, base.name), *more],
            os.environ,
            folder / f"replica-{number}.log",
        )
        for number, port in enumerate(ports)
    ]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    with own_home(folder) as home:
        env = environment(home, base, settings) | {
            "TAILOR_REPLICAS": ",".join(urls),
            "TAILOR_REPLICA_TOKEN": TOKEN,
            "TAILOR_PROBE_INTERVAL_S": "0.2",
            **settings.settings,
        }
        gateway = Child([sys.executable, "-m", "gateway.server", "--with-parent"], env, folder / "gateway.log")
        worker = (
            Child([sys.executable, "-m", "gateway.training_worker", "--with-parent"], env, folder / "worker.log")
            if settings.worker
            else None
        )
        stack = FakeStack(*addresses(env), "", gateway, replicas, urls, worker, settings.slots)
        if worker is not None:
            stack.can |= {ActionKind.TRAIN}
        try:
            for child in (*replicas, gateway):
                child.start()
            await until_ready(stack.url, settings.replicas, stack.children(), START_S)
            if worker is not None:
                worker.start()
            stack.operator_key = (home / "operator-key").read_text().strip()
            yield stack
        finally:
            for child in stack.children():
                await child.stop()


def _fake_command(settings: StackSettings, port: int, fingerprint: str, base_name: str) -> list[str]:
    told = {
        "port": port,
        "fingerprint": fingerprint,
        "base-name": base_name,
        "slots": settings.slots,
        "host-adapters": settings.host_adapters,
        "max-num-seqs": settings.max_num_seqs,
        "max-model-len": settings.max_model_len,
        "step-ms": settings.step_ms,
        "per-sequence-us": settings.per_sequence_us,
        "per-prompt-token-us": settings.per_prompt_token_us,
        "load-ms": settings.load_ms,
        "activate-ms": settings.activate_ms,
    }
    arguments = [word for name, value in told.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "-m", "loadtests.fake", *arguments]


async def _replica(api: Api, key: str, url: str) -> dict[str, Any]:
    found = (await api.call(key, "GET", "/admin/v1/replicas"))["data"]
    return next(one for one in found if one["url"] == url)


async def _until(api: Api, key: str, url: str, within_s: float, holds: Callable[[Mapping[str, Any]], bool]) -> None:
    stop = time.monotonic() + within_s
    while time.monotonic() < stop:
        try:
            if holds(await _replica(api, key, url)):
                return
        except (ServerRefused, ServerUnreachable):
            pass
        await asyncio.sleep(LOOK_S)
    raise StackFailed(f"{url} did not come to what was waited for within {within_s:.0f} s")
