"""The fake replica as a process on a Unix socket: `python -m tests.fakes.replica_process SOCKET FINGERPRINT`."""

import asyncio
import signal
import sys

from adapter_store.process import die_with_parent
from loadtests.fake.replica import FakeReplica


async def main(path: str, fingerprint: str) -> None:
    fake = FakeReplica(fingerprint, base_name="base")
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with await asyncio.start_unix_server(fake._serve, path):
        await stop.wait()
        while fake.in_flight:
            await asyncio.sleep(0.01)


if __name__ == "__main__":
    die_with_parent()
    asyncio.run(main(*sys.argv[1:]))
