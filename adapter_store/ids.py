"""Ids that cannot be swapped for one another, and how new ones are made."""

import secrets
from typing import NewType

TenantId = NewType("TenantId", str)
AdapterId = NewType("AdapterId", str)
VersionId = NewType("VersionId", str)
UploadId = NewType("UploadId", str)


def new_adapter_id() -> AdapterId:
    return AdapterId(f"adp_{secrets.token_hex(12)}")


def new_erasure_id(now: int) -> str:
    """Ids sort by the time at which they were made."""
    return f"ers_{now:010x}{secrets.token_hex(8)}"


def new_rollout_id(now: float) -> str:
    """Twelve hex digits of milliseconds, so that the rollouts of one second sort by the time at which they began."""
    return f"rol_{int(now * 1_000):012x}{secrets.token_hex(6)}"


def new_version_id() -> VersionId:
    return VersionId(f"ver_{secrets.token_hex(12)}")


def new_upload_id() -> UploadId:
    return UploadId(f"upl_{secrets.token_hex(12)}")
