"""What a gateway tidies up now and then: blobs that a crash left without a row, and blobs that rotted."""

import asyncio
import logging

from adapter_store.errors import AdapterStoreError
from adapter_store.scrub import FAULTS, Outcome, Scrubber
from adapter_store.store import AdapterStore

log = logging.getLogger("tailor.housekeeping")
EVERY_S = 3_600.0
ORPHANS_AFTER_S = 86_400.0  # far above the longest upload, so that no publish under way is raced


async def tidy(store: AdapterStore) -> None:
    """Tidy every hour, for ever; meant to run as one task."""
    while True:
        await asyncio.sleep(EVERY_S)
        try:
            removed = await store.collect_orphans(ORPHANS_AFTER_S)
        except AdapterStoreError as error:
            log.warning("orphans were not collected: %s", error)
        except Exception:  # tidying must never end
            log.exception("orphans were not collected")
        else:
            if removed:
                log.info("%d orphaned blobs removed", removed)


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
