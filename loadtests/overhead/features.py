"""Whether the gateway that was measured had everything switched on: a stripped one would be fast for nothing."""

import asyncio
from typing import Any

import httpx

from loadtests.overhead.client import Pool, Reply, Target
from loadtests.overhead.stack import RunningGateway

RECEIPTS = (b"x-tailor-adapter:", b"x-tailor-version:", b"x-tailor-replica:", b"server-timing:", b"x-request-id:")
LIMITS = (b"x-ratelimit-limit-requests:", b"x-ratelimit-limit-tokens:")


def missing_features(gateway: RunningGateway, target: Target, upstream_port: int) -> list[str]:
    """Names of those parts whose traces an answer, the metrics or the exporter's target lack."""
    head = asyncio.run(_answer(target)).head.lower()
    stats: dict[str, Any] = httpx.get(f"http://127.0.0.1:{upstream_port}/stats", trust_env=False).json()
    seen = {
        "receipts": all(name in head for name in RECEIPTS),
        "limits": all(name in head for name in LIMITS),
        "metrics": "tailor" in gateway.metrics(),
        "traces": stats["traces"] > 0,
    }
    return [name for name, there in seen.items() if not there]


async def _answer(target: Target) -> Reply:
    async with Pool(target) as pool:
        return await pool.ask(target.request(max_tokens=4))
