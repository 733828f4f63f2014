"""What this package raises. No HTTP here: `gateway/errors.py` maps classes to statuses.

AdapterStoreError
├── AdapterNotFound        no such adapter or version for this tenant; another tenant's looks the same
├── AdapterRejected        the inspection found faults; `.faults` lists them
├── OtherBaseModel         the version was trained on a base model that is not served now
├── NameInvalid            the adapter's name breaks the rule
├── NameReserved           the name belongs to the base model
├── AliasNotFound          the adapter has no such alias
├── AliasInvalid           its name or its weights break the rule
├── FactorInvalid          a version is not scaled by that
├── AliasKept              `default` is not removed
├── TooManyAliases         of one adapter
├── NothingToRollBack      the alias has no earlier place, or what it stood for is gone
├── RolloutRunning         one rollout at a time on an alias
├── RolloutInvalid         it leads nowhere, or its policy breaks the rule
├── RolloutNotFound        the adapter has no such rollout
├── RolloutOver            it has ended already
├── PromptsInvalid         golden prompts or a reference break their bounds
├── BundleTooLarge         a file passes its limit
├── BundleIncomplete       a file is missing or empty
├── QuotaExceeded          the tenant has as much as its plan allows
├── ArchiveInvalid         neither a tar, a tar.gz nor a zip, or not one that can be read as a stream
│   ├── ArchiveTruncated   it ends too early
│   ├── ArchiveTooDense    it unpacks to far more than it is
│   └── MemberRefused      it has a member that does not belong in an adapter
├── UploadNotFound         no such upload for this tenant, or it is over
├── PartInvalid            a part of an upload has another size or checksum than it should
├── PartConflict           the part is there with other bytes
├── PartsMissing           an upload is completed before all its parts are there
├── ChecksumMismatch       a file is not what was declared
├── TooManyUploads         the tenant has as many uploads under way as one may have
├── ImportInvalid          what is to be imported is not there, or not where imports come from
├── BaseModelInvalid       the base model's folder cannot be read
├── VersionInUse           an alias stands for it or may go back to it, or requests run on it
├── ErasureNotFound        no such erasure of this tenant
├── PermissionNotFound     the version has no such permission
├── TooManyPermissions     the version is lent to as many tenants as one may be
├── SignatureInvalid       a signed statement is not what was signed, or by whom
├── BlobCorrupt            stored bytes are not what their digest says, or are gone
└── StorageError
    ├── StorageFull        no space, or the quota is used up
    └── StorageUnavailable database or blob store does not answer; try again
"""

from collections.abc import Sequence
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


class AliasNotFound(AdapterStoreError):
    """The adapter has no alias of that name."""

    def __init__(self, name: str, alias: str) -> None:
        super().__init__(f"adapter '{name}' has no alias {alias[:64]!r}")


class AliasInvalid(AdapterStoreError):
    """An alias's name or its weights break the rule that the message states."""


class FactorInvalid(AdapterStoreError):
    """What a version is to be scaled by is not a number within the bounds."""


class AliasKept(AdapterStoreError):
    """The default alias goes with its adapter only."""


class TooManyAliases(AdapterStoreError):
    """The adapter has as many aliases as one may have."""


class NothingToRollBack(AdapterStoreError):
    """The alias stood for nothing before, or for what has been deleted."""


class RolloutRunning(AdapterStoreError):
    """The alias is on its way already, or stands for several versions."""


class RolloutInvalid(AdapterStoreError):
    """A rollout's target or its policy breaks the rule that the message states."""


class RolloutNotFound(AdapterStoreError):
    """The adapter has no rollout of that id."""

    def __init__(self, rollout_id: str) -> None:
        super().__init__(f"there is no rollout {rollout_id[:64]!r} of this adapter")


class RolloutOver(AdapterStoreError):
    """The rollout has ended; its status says how."""


class PromptsInvalid(AdapterStoreError):
    """Golden prompts or a reference break the bound that the message states."""


class BundleTooLarge(AdapterStoreError):
    """A file of the bundle is larger than its limit."""

    def __init__(self, file: str, limit_bytes: int) -> None:
        super().__init__(f"{file} is larger than the limit of {limit_bytes} bytes")
        self.file = file
        self.limit_bytes = limit_bytes


class BundleIncomplete(AdapterStoreError):
    """A file of the bundle is missing, empty or sent twice."""


class QuotaExceeded(AdapterStoreError):
    """The tenant has as much as its plan allows; `quota` names the plan's field."""

    def __init__(self, quota: str, message: str) -> None:
        super().__init__(message)
        self.quota = quota


class ArchiveInvalid(AdapterStoreError):
    """The upload is not an archive that can be read as it comes."""


class ArchiveTruncated(ArchiveInvalid):
    """The archive ends too early."""


class ArchiveTooDense(ArchiveInvalid):
    """The archive unpacks to far more bytes than it has."""


class MemberRefused(ArchiveInvalid):
    """The archive has a member that is not one of an adapter's files."""


class UploadNotFound(AdapterStoreError):
    """The tenant has no such upload, or it is over."""

    def __init__(self) -> None:
        super().__init__("this upload does not exist, or is over: begin a new one")


class PartInvalid(AdapterStoreError):
    """A part is not what its number and its checksum say."""


class PartConflict(AdapterStoreError):
    """The part is there already, with other bytes."""


class PartsMissing(AdapterStoreError):
    """Parts are still to come."""


class ChecksumMismatch(AdapterStoreError):
    """All parts are there, and the file is not the one that was declared."""


class TooManyUploads(AdapterStoreError):
    """The tenant has as many uploads under way as one may have."""


class ImportInvalid(AdapterStoreError):
    """What is to be imported is not there, or not where imports may come from."""


class BaseModelInvalid(AdapterStoreError):
    """The base model's folder is not one that adapters can be checked against."""


class VersionInUse(AdapterStoreError):
    """Aliases stand for the version or may go back to it, or requests are running on it; without force it stays."""

    def __init__(self, name: str, number: int | None, aliases: Sequence[str], running: int = 0) -> None:
        what = f"adapter '{name}'" if number is None else f"version {number} of '{name}'"
        by = [f"the alias{'es' * (len(aliases) > 1)} {', '.join(aliases)}"] if aliases else []
        by += [f"{running} request{'s' * (running > 1)} running on it"] if running else []
        hint = "move the aliases or cancel their rollouts first, or repeat" if aliases else "wait, or repeat"
        super().__init__(f"{what} is in use by {' and '.join(by)}: {hint} with force=true")


class ErasureNotFound(AdapterStoreError):
    """The tenant has no erasure of that id."""

    def __init__(self, erasure_id: str) -> None:
        super().__init__(f"there is no erasure {erasure_id[:64]!r}")


class PermissionNotFound(AdapterStoreError):
    """The version has no such permission."""

    def __init__(self, grant_id: str) -> None:
        super().__init__(f"permission {grant_id[:64]!r} does not exist")


class TooManyPermissions(AdapterStoreError):
    """The version is lent to as many tenants as one may be."""


class SignatureInvalid(AdapterStoreError):
    """What is shown as signed was changed, or signed with another key."""


class BlobCorrupt(AdapterStoreError):
    """Stored bytes are gone or differ from their digest."""


class StorageError(AdapterStoreError):
    """The place where bytes or rows are kept failed."""


class StorageFull(StorageError):
    """No space is left, or the quota is used up; nothing was kept."""


class StorageUnavailable(StorageError):
    """Database or blob store does not answer; the call may be repeated."""
