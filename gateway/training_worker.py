"""A training worker's process: `tailor worker` becomes `python -m gateway.training_worker`.

It needs the database, the blob store and the base model's folder, and opens no socket but to the first two. Until it
has its first job it is small: torch and the base are loaded for that one, and stay.
"""

import argparse
import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from adapter_store.bundle import Staging
from adapter_store.engine import AsyncEngine
from adapter_store.errors import AdapterStoreError, StorageError
from adapter_store.process import die_with_parent
from gateway.database import migrate
from gateway.home import ConfigurationError, Home
from gateway.logs import set_up_logging
from gateway.settings import Settings, explain
from gateway.store_opening import open_store
from gateway.tenants import SUSPENDED
from training.results import Results
from training.worker import Options, Worker

if TYPE_CHECKING:
    from training.warm_base import WarmBase

log = logging.getLogger("tailor.training")
OFFLINE: Final = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
QUIET: Final = {"TRANSFORMERS_VERBOSITY": "error", "TOKENIZERS_PARALLELISM": "false"}
TINY_BYTES: Final = 64 << 20
"""A base whose matrices are too small for several threads to share: one is faster."""
STOP_SHARE: Final = 0.7
"""Of the time after which a supervisor kills, what the saving of jobs may take."""
LONGEST_PAUSE_S: Final = 15.0


def main() -> None:
    """The process's entry; what an operator can mend is told without a traceback."""
    parser = argparse.ArgumentParser("gateway.training_worker")
    parser.add_argument("--with-parent", action="store_true", help="end when the parent does")
    if parser.parse_args().with_parent:
        die_with_parent()
    try:
        asyncio.run(run_worker(Settings()))
    except ValidationError as error:
        sys.exit(f"tailor: {explain(error)}")
    except (ConfigurationError, AdapterStoreError) as error:
        sys.exit(f"tailor: {error}")


async def run_worker(settings: Settings) -> None:
    """Train jobs until SIGTERM or SIGINT; then save them and give them back. A second signal ends it at once.

    Raises:
        ConfigurationError, BaseModelInvalid: a setting is missing or names something unusable.
    """
    os.umask(0o077)
    os.environ.update({**OFFLINE, **QUIET})  # read when their libraries are imported, with the first job
    os.nice(settings.training_nice)
    set_up_logging(settings.log_level)
    home = Home(settings.home)
    opened = open_store(settings, home)
    staging = Staging(home.path / "training", weights_limit_bytes=settings.max_adapter_bytes)
    results = Results(opened.engine, opened.blobs, opened.store, staging, time.time)
    fingerprint = opened.base.fingerprint
    worker = Worker(results, _loader(settings, opened.base_folder, fingerprint), _options(settings, fingerprint))
    stopping = _stopped_by_signals()
    try:
        await _until_schema(opened.engine, stopping)
        staging.sweep()
        await worker.run(stopping)
    finally:
        await opened.inspector.close()
        await opened.engine.dispose()


def _options(settings: Settings, fingerprint: str) -> Options:
    return Options(
        name=f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}",
        base_fingerprint=fingerprint,
        tokens=settings.training_tokens,
        most_jobs=settings.training_jobs,
        save_every_s=settings.training_save_every_s,
        lease_s=settings.training_lease_s,
        stop_s=STOP_SHARE * settings.drain_s,
        held_back=SUSPENDED,
    )


def _loader(settings: Settings, folder: Path, fingerprint: str) -> Callable[[], "WarmBase"]:
    threads = settings.training_threads or _threads(folder)
    device = None if settings.training_device == "auto" else settings.training_device

    def load() -> "WarmBase":
        from training.warm_base import WarmBase

        base = WarmBase(folder, fingerprint=fingerprint, device=device, threads=threads)
        log.info("the base is loaded, on %s", base.means)
        return base

    return load


def _threads(folder: Path) -> int:
    is_tiny = sum(file.stat().st_size for file in folder.glob("*.safetensors")) < TINY_BYTES
    return 1 if is_tiny else len(os.sched_getaffinity(0))


def _stopped_by_signals() -> asyncio.Event:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()

    def stop() -> None:
        if stopping.is_set():
            os._exit(1)  # the leases run out, and other workers go on from what was saved last
        stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return stopping


async def _until_schema(engine: AsyncEngine, stopping: asyncio.Event) -> None:
    """The database's schema is today's; while it is away, it is waited for."""
    pause_s = 0.5
    while not stopping.is_set():
        try:
            await migrate(engine)
        except StorageError as error:
            log.warning("%s; tried again in %.1f s", error, pause_s)
        else:
            return
        with suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await stopping.wait()
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


if __name__ == "__main__":
    main()
