"""`/health`: this process runs. `/ready`: a request would be answered now."""

import asyncio

from fastapi import Response
from fastapi.responses import JSONResponse
from sqlalchemy import text

from gateway.api.lazy import LazyRouter
from gateway.dependencies import AppParts
from gateway.replicas.replica import ReplicaState

router = LazyRouter(tags=["health"])
DATABASE_PATIENCE_S = 2.0


@router.get("/health")
async def health() -> dict[str, str]:
    """Alive."""
    return {"status": "ok"}


@router.get("/ready")
async def ready(parts: AppParts) -> Response:
    """200 when the database answers and at least one replica is ready, 503 from the moment this process drains.

    Counts only, no inner names.
    """
    states = list(parts.pool.states().values())
    database = True
    try:
        async with asyncio.timeout(DATABASE_PATIENCE_S), parts.engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
    except Exception:  # noqa: BLE001  any failure means the same here, and the body says which part it was
        database = False
    count = states.count(ReplicaState.READY)
    draining = parts.draining.is_set()
    body = {
        "ready": database and count > 0 and not draining,
        "draining": draining,
        "database": database,
        "replicas": len(states),
        "replicas_ready": count,
    }
    headers = {} if body["ready"] else {"retry-after": "5"}
    return JSONResponse(body, 200 if body["ready"] else 503, headers)
