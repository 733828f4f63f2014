"""`tailor up` with real engines on this machine's CPU."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from loadtests.children import Child, StackFailed
from loadtests.overhead.processes import PROC, with_descendants
from loadtests.scenario import Action, ActionKind, StackSettings
from loadtests.stacks import OVER_HTTP, addresses, environment, own_home, until_ready

START_S: Final = 600.0
"""Of each engine: they start one after the other."""


@dataclass(slots=True)
class CpuStack:
    """`tailor up` with real engines."""

    url: str
    metrics_url: str
    operator_key: str
    up: Child
    count: int
    slots: int = 0
    kind: str = "cpu"
    can: frozenset[ActionKind] = OVER_HTTP | {
        ActionKind.KILL_REPLICA,
        ActionKind.STOP_REPLICA,
        ActionKind.ROLLING_RESTART,
    }

    async def disturb(self, action: Action) -> None:
        """As the action says; a killed engine is brought back by its supervisor."""
        if action.kind is ActionKind.ROLLING_RESTART:
            await _run([sys.executable, "-m", "gateway.cli", "restart"], self.up.env)
            return
        pids = self._replica_pids(action.replica % self.count)
        if not pids:
            raise StackFailed(f"replica {action.replica} does not run")
        if action.kind is ActionKind.KILL_REPLICA:
            _signal(pids, signal.SIGKILL)
        else:
            _signal(pids, signal.SIGSTOP)
            await asyncio.sleep(action.duration_s)
            _signal(pids, signal.SIGCONT)

    def _replica_pids(self, number: int) -> set[int]:
        """The API server's process of one replica, and its engine's."""
        parents, roots = {}, set()
        for process in PROC.iterdir():
            if not process.name.isdigit():
                continue
            try:
                pid = int(process.name)
                parents[pid] = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                words = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:  # it has ended meanwhile
                continue
            if any(word.endswith(b"replica-%d.sock" % number) for word in words):
                roots.add(pid)
        assert self.up.process is not None
        return with_descendants(roots & with_descendants({self.up.process.pid}, parents), parents)


def _signal(pids: set[int], number: signal.Signals) -> None:
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:  # it ended with another one
            continue


async def _run(command: Sequence[str], env: Mapping[str, str]) -> None:
    process = await asyncio.create_subprocess_exec(
        *command, env=dict(env), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    if process.returncode:
        raise StackFailed(f"{' '.join(command)}: {said.decode(errors='replace')[-500:]}")


@asynccontextmanager
async def cpu_stack(settings: StackSettings, folder: Path, *, base: Path) -> AsyncIterator[CpuStack]:
    """`tailor up` with so many real engines, ready all, until the block ends; its logs are in `folder`.

    Raises:
        StackFailed: it does not start.
    """
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    with own_home(folder) as home:
        env = environment(home, base, settings) | {
            "TAILOR_LOCAL_REPLICAS": str(settings.replicas),
            "TAILOR_ADAPTER_SLOTS": str(settings.slots),
            "TAILOR_HOST_ADAPTERS": str(settings.host_adapters),
            "TAILOR_MAX_MODEL_LEN": str(min(settings.max_model_len, _context(base))),
            "TAILOR_VLLM_ARGS": f"--max-num-seqs {settings.max_num_seqs}",
            "TAILOR_TRAINING_WORKERS": str(int(settings.worker)),
            "TAILOR_PROBE_DEADLINE_S": "20",  # a slow token of a busy CPU is no frozen engine
            **settings.settings,
        }
        up = Child([sys.executable, "-m", "gateway.cli", "up", "--with-parent"], env, folder / "up.log")
        stack = CpuStack(*addresses(env), "", up, settings.replicas, settings.slots)
        if settings.worker:
            stack.can |= {ActionKind.TRAIN}
        try:
            up.start()
            await until_ready(stack.url, settings.replicas, [up], START_S * settings.replicas)
            stack.operator_key = (home / "operator-key").read_text().strip()
            yield stack
        finally:
            await up.stop()


def _context(base: Path) -> int:
    """How many positions the base was made for: vLLM refuses to serve more."""
    config = json.loads((base / "config.json").read_text())
    return int(config.get("max_position_embeddings") or sys.maxsize)
