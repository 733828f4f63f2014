"""What this package raises. No HTTP here: `gateway/errors.py` maps classes to statuses.

AdapterStoreError
├── AdapterNotFound        no such adapter or version for this tenant; another tenant's looks the same
├── AdapterRejected        the inspection found faults; `.faults` lists them
├── OtherBaseModel         the version was trained on a base model that is not served now
├── NameInvalid            the adapter's name breaks the rule
├── NameReserved           the name belongs to the base model
├── BundleTooLarge         a file passes its limit
├── BundleIncomplete       a file is missing or empty
├── BaseModelInvalid       the base model's folder cannot be read
├── BlobCorrupt            stored bytes are not what their digest says, or are gone
└── StorageError
    ├── StorageFull        no space, or the quota is used up
    └── StorageUnavailable database or blob store does not answer; try again
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapter_store.faults import Fault


class AdapterStoreError(Exception):
    """The root of this tree; its text names what was wrong, where, and what to do."""


class AdapterNotFound(AdapterStoreError):
    """The tenant has no such adapter or version."""

    def __init__(self, model: str) -> None:
        super().__init__(f"adapter {model[:128]!r} does not exist")
        self.model = model


class AdapterRejected(AdapterStoreError):
    """The adapter is not fit to be served; every fault found is in `faults`."""

    def __init__(self, faults: "tuple[Fault, ...]") -> None:
        first = faults[0]
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        super().__init__(f"{first.code}: {first.where}: found {first.found}, expected {first.expected}{more}")
        self.faults = faults


class OtherBaseModel(AdapterStoreError):
    """The version was made for another base model than the one that is served."""


class NameInvalid(AdapterStoreError):
    """The adapter's name breaks the rule that the message states."""


class NameReserved(AdapterStoreError):
    """The adapter's name is the base model's."""


class BundleTooLarge(AdapterStoreError):
    """A file of the bundle is larger than its limit."""

    def __init__(self, file: str, limit_bytes: int) -> None:
        super().__init__(f"{file} is larger than the limit of {limit_bytes} bytes")
        self.file = file
        self.limit_bytes = limit_bytes


class BundleIncomplete(AdapterStoreError):
    """A file of the bundle is missing, empty or sent twice."""


class BaseModelInvalid(AdapterStoreError):
    """The base model's folder is not one that adapters can be checked against."""


class BlobCorrupt(AdapterStoreError):
    """Stored bytes are gone or differ from their digest."""


class StorageError(AdapterStoreError):
    """The place where bytes or rows are kept failed."""


class StorageFull(StorageError):
    """No space is left, or the quota is used up; nothing was kept."""


class StorageUnavailable(StorageError):
    """Database or blob store does not answer; the call may be repeated."""
