"""What a gateway tidies up now and then: what crashes left, what is over, and blobs that rotted."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from adapter_store.errors import AdapterStoreError
from adapter_store.scrub import FAULTS, Outcome, Scrubber
from adapter_store.store import AdapterStore
from adapter_store.uploads import Uploads
from gateway.idempotency import Answers
from training.file_uploads import FileUploads
from training.files import Files

log = logging.getLogger("tailor.housekeeping")
EVERY_S = 3_600.0
ORPHANS_AFTER_S = 86_400.0  # far above the longest upload, so that no publish under way is raced


async def tidy(
    store: AdapterStore,
    uploads: Uploads,
    files: Files,
    file_uploads: FileUploads,
    saved_runs: Callable[[], Awaitable[int]],
    answers: Answers,
) -> None:
    """Tidy every hour, for ever; meant to run as one task."""
    while True:
        await asyncio.sleep(EVERY_S)
        await _tidied("orphaned blobs", lambda: store.collect_orphans(ORPHANS_AFTER_S))
        await _tidied("parts of uploads that are over", uploads.sweep)
        await _tidied("expired files", files.sweep)
        await _tidied("parts of files", file_uploads.sweep)
        await _tidied("saves of training runs", saved_runs)
        await _tidied("kept answers", answers.sweep)


async def scrub(scrubber: Scrubber) -> None:
    """Read what is due every hour, for ever, and count the faults that are known; meant to run as one task."""
    while True:
        try:
            await scrubber.count_faults()
            await asyncio.sleep(EVERY_S)
            found = await scrubber.run() if scrubber.is_on else {}
        except AdapterStoreError as error:
            log.warning("stored adapters were not checked: %s", error)
            await asyncio.sleep(EVERY_S)
        except Exception:  # housekeeping must never end
            log.exception("stored adapters were not checked")
            await asyncio.sleep(EVERY_S)
        else:
            if any(outcome in found for outcome in (*FAULTS, Outcome.REPAIRED)):
                log.warning("stored adapters were checked: %s", ", ".join(f"{n} {name}" for name, n in found.items()))


async def _tidied(what: str, sweep: Callable[[], Awaitable[int]]) -> None:
    try:
        removed = await sweep()
    except AdapterStoreError as error:
        log.warning("%s were not removed: %s", what, error)
    except Exception:  # tidying must never end
        log.exception("%s were not removed", what)
    else:
        if removed:
            log.info("%d %s removed", removed, what)
