"""U4: a large upload costs a gateway next to no memory, however it comes, and comes in as fast as it is copied.

The ordinary run sends 128 MiB each way; `-m full` sends 2 GiB.
"""

from pathlib import Path
from typing import Any

import pytest

from tests.bench.uploads import WAYS, run

EXTRA_MIB = 32.0


async def measured(size_bytes: int, folder: Path, rounds: int) -> list[dict[str, Any]]:
    return await run(size_bytes, WAYS, folder, rounds)


async def test_a_large_upload_takes_no_memory(tmp_path: Path) -> None:
    """As a form, as an archive and in parts: at most 32 MiB more than before, for 128 MiB (2 GiB with `-m full`)."""
    found = await measured(128 << 20, tmp_path, rounds=1)
    assert [told["way"] for told in found] == list(WAYS)
    assert all(told["extra_rss_mib"] <= EXTRA_MIB for told in found), found


@pytest.mark.full
@pytest.mark.timeout(1_800)
async def test_two_gigabytes_take_no_memory_and_little_time(tmp_path: Path) -> None:
    """2 GiB each way, on one connection: at most 32 MiB; at 0.7 of cp and sha256sum or better, until it is answered."""
    found = await measured(2 << 30, tmp_path, rounds=3)
    assert all(told["extra_rss_mib"] <= EXTRA_MIB for told in found), found
    assert all(told["throughput_ratio"] >= 0.7 for told in found), found
