"""A fake replica that can be killed: `python -m tests.chaos.replica_process PORT FINGERPRINT LOG`.

Its engine takes time, so that a kill finds streams in every state. What must outlive a kill is in the log, one JSON
object a line: what would hurt a real engine, and what each life held when its first request came.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapter_store.process import die_with_parent
from loadtests.fake.engine import EngineModel
from loadtests.fake.replica import FakeReplica, Served


class Log(list[str]):
    """Violations that are on disk as soon as they are seen."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def append(self, violation: str) -> None:
        self.write(violation=violation)

    def write(self, **line: object) -> None:
        with self._path.open("a") as log:
            log.write(json.dumps(line) + "\n")


class Mortal(FakeReplica):
    """Notes what it held when the first request of its life came."""

    def _serve_record(self, name: str | None, body: dict[str, Any]) -> Served:
        if not self.served and isinstance(self.violations, Log):
            self.violations.write(life=self.generation, held=len(self.adapters))
        return super()._serve_record(name, body)


async def main(port: str, fingerprint: str, log: str) -> None:
    engine = EngineModel(max_num_seqs=32, base_step_s=0.005, per_sequence_s=0.0001, load_s=0.005)
    fake = Mortal(fingerprint, base_name="base", port=int(port), engine=engine, keep_requests=False, events=24)
    fake.violations = Log(Path(log))
    await fake.start()
    await asyncio.Event().wait()


@dataclass
class ReplicaProcess:
    """One address, one life after the other."""

    port: int
    fingerprint: str
    log: Path
    process: asyncio.subprocess.Process | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        words = [str(self.port), self.fingerprint, str(self.log)]
        self.process = await asyncio.create_subprocess_exec(sys.executable, "-m", __name__, *words)
        async with asyncio.timeout(60):
            while True:
                try:
                    _, writer = await asyncio.open_connection("127.0.0.1", self.port)
                except ConnectionRefusedError:
                    assert self.process.returncode is None
                    await asyncio.sleep(0.02)
                else:
                    writer.close()
                    return

    async def kill(self) -> None:
        """SIGKILL: the kernel closes what it had open, in the middle of whatever it was."""
        if self.process is not None and self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    def told(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


@asynccontextmanager
async def replica_process(port: int, fingerprint: str, log: Path) -> AsyncIterator[ReplicaProcess]:
    """A running one; at its end it must have seen nothing that would hurt a real engine."""
    process = ReplicaProcess(port, fingerprint, log)
    await process.start()
    try:
        yield process
    finally:
        await process.kill()
    assert [line for line in process.told() if "violation" in line] == []


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(main(*sys.argv[1:]))
