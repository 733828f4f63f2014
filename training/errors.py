"""What this package raises of files and jobs. No HTTP here: `gateway/errors.py` maps classes to statuses.

TrainingError
├── FileNotKnown       no such file of this tenant; another tenant's looks the same
├── FileInvalid        the data cannot be trained on; `.faults` lists every line
├── TooManyChecks      other files' checks take too long for this one to have its turn
├── FileTooLarge       more bytes than one file may have
├── FileInUse          jobs that are not over need it
├── FileDamaged        what is stored of it is not what was sent, or is gone
├── FileUploadNotKnown no such upload of this tenant, or it is over
├── FileUploadOver     the upload was completed or cancelled
├── TooManyFileUploads the tenant has as many under way as one may have
├── PartNotKnown       the upload has no such part
├── PartTooLarge       more bytes than were declared, or too many parts
├── PartDamaged        a part is not what was sent, or is gone
├── SizeDiffers        the parts together have another size than was declared
├── Md5Differs         or another MD5
├── FileUnfit          a job cannot train on the file that it names
├── JobNotFound        no such job of this tenant; another tenant's looks the same
├── StateConflict      the job's state does not allow it
├── TooManyQueued      the tenant has as many jobs waiting as its plan allows
├── LeaseLost          the job is not this worker's any more
├── NotServable        what the job would give could not be served; `.nearest` could
└── OptionInvalid      the numbers of a job do not go together

What goes wrong with rows and blobs is raised as `adapter_store.errors` has it: QuotaExceeded, StorageError.
"""

from collections.abc import Sequence
from dataclasses import dataclass


class TrainingError(Exception):
    """The root of this tree; its text names what was wrong, where, and what to do."""


class FileNotKnown(TrainingError):
    """The tenant has no such file."""

    def __init__(self, file_id: str) -> None:
        super().__init__(f"There is no file '{file_id[:64]}': GET /v1/files lists what there is.")


@dataclass(frozen=True, slots=True)
class LineFault:
    """What is wrong with one line of a data file; lines count from 1, and 0 is the file as a whole."""

    line: int
    reason: str


class FileInvalid(TrainingError):
    """The data cannot be trained on; `faults` has every fault, up to a cap where the reading is not `complete`."""

    def __init__(self, faults: Sequence[LineFault], *, complete: bool = True) -> None:
        first = faults[0]
        where = f"line {first.line}: " if first.line else ""
        others = len(faults) - 1
        more = "" if complete and not others else f" (and {'' if complete else 'at least '}{others} more)"
        super().__init__(f"The file cannot be trained on: {where}{first.reason}{more}. Nothing of it was kept.")
        self.faults = tuple(faults)


class TooManyChecks(TrainingError):
    """The file has waited for its check as long as it may."""

    def __init__(self) -> None:
        super().__init__(
            "Other files are being checked, and this one has waited too long; nothing was kept. Try again."
        )


class FileTooLarge(TrainingError):
    """A file has more bytes than one may have."""

    def __init__(self, limit_bytes: int) -> None:
        super().__init__(f"The file is larger than the {limit_bytes} bytes that one may have: split it.")
        self.limit_bytes = limit_bytes


class FileInUse(TrainingError):
    """Jobs that are not over need the file; without force it stays."""

    def __init__(self, file_id: str, jobs: Sequence[str]) -> None:
        by = ", ".join(jobs[:5]) + (f" and {len(jobs) - 5} more" if len(jobs) > 5 else "")
        super().__init__(f"The file '{file_id}' is in use by {by}: cancel it first, or repeat with force=true.")
        self.jobs = tuple(jobs)


class FileDamaged(TrainingError):
    """Stored bytes are gone or differ from their digest."""

    def __init__(self, file_id: str) -> None:
        super().__init__(f"What is stored of the file '{file_id}' is damaged: send it again, or ask the operator.")


class FileUploadNotKnown(TrainingError):
    """The tenant has no such upload, or it has expired."""

    def __init__(self, upload_id: str) -> None:
        super().__init__(f"There is no upload '{upload_id[:64]}', or it has expired: begin a new one.")


class FileUploadOver(TrainingError):
    """Nothing more can be done with the upload."""

    def __init__(self, upload_id: str, status: str) -> None:
        super().__init__(f"The upload '{upload_id}' is {status}: begin a new one.")


class TooManyFileUploads(TrainingError):
    """The tenant has as many uploads under way as one may have."""

    def __init__(self, most: int) -> None:
        super().__init__(f"{most} uploads are under way: complete or cancel one first.")


class PartNotKnown(TrainingError):
    """The upload has no part of that id."""

    def __init__(self, part_id: str) -> None:
        super().__init__(f"The upload has no part '{part_id[:64]}'.")


class PartTooLarge(TrainingError):
    """The part is more than what is left of the upload."""

    def __init__(self, left_bytes: int, most_parts: int) -> None:
        super().__init__(
            f"{left_bytes} bytes of what was declared are still to come, in {most_parts} parts at most: this is more."
        )


class PartDamaged(TrainingError):
    """Stored bytes of a part are gone or differ from their digest."""

    def __init__(self, part_id: str) -> None:
        super().__init__(f"The part '{part_id}' was damaged where it lay: cancel the upload, and begin a new one.")


class SizeDiffers(TrainingError):
    """The parts that were named have together another size than was declared."""

    def __init__(self, declared_bytes: int, found_bytes: int) -> None:
        super().__init__(
            f"{declared_bytes} bytes were declared, and these parts have {found_bytes}: name them all, in order."
        )


class Md5Differs(TrainingError):
    """The parts together are not what `md5` says."""

    def __init__(self, found: str) -> None:
        super().__init__(f"The parts in this order have the MD5 {found}, not the one that was given.")


class FileUnfit(TrainingError):
    """A job names a file that it cannot train on; `param` is which of its two."""

    def __init__(self, param: str, file_id: str, why: str) -> None:
        super().__init__(f"invalid {param}: {file_id[:64]}: {why}.")
        self.param = param


class JobNotFound(TrainingError):
    """The tenant has no such job."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"Could not find fine tune: {job_id[:64]}")
        self.job_id = job_id


class StateConflict(TrainingError):
    """The job's state does not allow it."""

    def __init__(self, job_id: str, status: str, wanted: str) -> None:
        super().__init__(f"Job {job_id} is {status} and cannot be {wanted}.")
        self.status = status


class TooManyQueued(TrainingError):
    """The tenant has as many jobs waiting as its plan allows."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"Your plan allows {limit} jobs that wait: cancel one, or wait until one has begun.")


class LeaseLost(TrainingError):
    """Nothing was written: the worker drops what it has of the job."""

    def __init__(self, job_id: str) -> None:
        super().__init__(f"Job {job_id} is leased to another worker, or over.")
        self.job_id = job_id


class NotServable(TrainingError):
    """What a job would give could not be served; `nearest` is the choice for `param` that could."""

    def __init__(self, param: str, message: str, nearest: str | int | list[str]) -> None:
        told = ", ".join(nearest) if isinstance(nearest, list) else nearest
        super().__init__(f"{param}: {message}; the nearest that can be served: {told}.")
        self.param = param
        self.nearest = nearest


class OptionInvalid(TrainingError):
    """The numbers of a job do not go together, or one is out of its bounds."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}.")
        self.param = param
