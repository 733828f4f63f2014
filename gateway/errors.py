"""Every error a client can see, and the one writer of OpenAI's error envelope.

    Exception
    ├── GatewayError                    raised by this package; message, param and retry_after_s travel to the client
    │   ├── KeyInvalid                  401
    │   ├── ScopeMissing                403
    │   ├── GrantTooWide                403   a key would grant more than its maker has
    │   ├── RouteUnknown                404
    │   ├── MethodNotAllowed            405
    │   ├── ModelUnknown                404   missing and another tenant's alike
    │   ├── ObjectUnknown               404
    │   ├── RequestInvalid              400
    │   │   └── ContextLengthExceeded   400
    │   ├── BodyTooLarge                413
    │   ├── BodyTooSlow                 408
    │   ├── NameTaken                   409
    │   ├── ReplicaInSettings           409
    │   ├── PlanInUse                   409
    │   ├── KeyIsOver                   409   what is revoked or expired is not rotated
    │   ├── LastOperatorKey             409
    │   ├── TooManyKeys                 409
    │   ├── TooManyPins                 409
    │   ├── ProofMissing                409   an alias moves to what is proved, where that is required
    │   ├── ProofFailed                 409
    │   ├── KeyReused                   409   an Idempotency-Key of another request
    │   ├── RateLimited                 429 + Retry-After, x-ratelimit-*
    │   │   ├── TokenRateLimited        429 + Retry-After, x-ratelimit-*
    │   │   ├── QuotaSpent              429   waiting does not help
    │   │   └── RequestExceedsLimit     400   larger than a minute's limit: can never be admitted
    │   ├── ReplicaUnavailable          503 + Retry-After
    │   ├── TooBusy                     503 + Retry-After
    │   ├── TooManyWaiting              429 + Retry-After
    │   ├── TooManyLoads                429 + Retry-After
    │   ├── TooManyStreams              429 + Retry-After
    │   ├── UploadsUnderWay             429 + Retry-After
    │   ├── ReplicaFailed               502
    │   └── AdapterNotLoadable          503 + Retry-After
    │       └── AdapterQuarantined      503 + Retry-After where it ends by itself
    ├── adapter_store.errors.AdapterStoreError     mapped below, class by class
    └── training.errors.TrainingError              likewise

The text of an engine, a path or a name inside the engine never becomes part of an answer.
"""

from dataclasses import dataclass
from typing import ClassVar, Final

import msgspec
from starlette.types import Scope, Send

from adapter_store import errors as store
from adapter_store.faults import Fault
from adapter_store.scaling import read_scaling
from training import errors as training


class GatewayError(Exception):
    """What was wrong, where, and what to do; written for the client."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    headers: tuple[tuple[bytes, bytes], ...] = ()  # what the answer carries beside the usual ones

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.own_code = code


class KeyInvalid(GatewayError):
    """The key is absent, unknown, expired or revoked; which of these is not told."""

    status, type, code = 401, "authentication_error", "invalid_api_key"


class ScopeMissing(GatewayError):
    """The key is good, but not for this."""

    status, type, code = 403, "permission_error", "insufficient_scope"


class GrantTooWide(GatewayError):
    """The key asked for would grant more than the one that makes it has."""

    status, type, code = 403, "permission_error", "grant_too_wide"


class RouteUnknown(GatewayError):
    """No such path."""

    status, type, code = 404, "invalid_request_error", "unknown_url"

    def __init__(self) -> None:
        super().__init__("There is no such path; docs/api.md lists those that exist.")


class MethodNotAllowed(GatewayError):
    """The path exists, the method does not; `allow`: which do, separated by commas."""

    status, type, code = 405, "invalid_request_error", "method_not_allowed"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.headers = ((b"allow", allow.encode()),)


def _how_to_scale(model: str) -> str:
    """The same for whatever is spelled so, whoever has it."""
    name, _, rest = model[:128].partition("@")
    if read_scaling(rest) is None:
        return ""
    number, _, factor = rest.partition("*")
    return (
        f" A scaled version is made first: `tailor adapter scale {name}@{number} {factor}`, or "
        f'POST /v1/adapters/{name}/versions/{number}/scaled {{"factor": {factor}}}.'
    )


class ModelUnknown(GatewayError):
    """The tenant has no such model."""

    status, type, code = 404, "invalid_request_error", "model_not_found"

    def __init__(self, model: str, *, param: str = "model") -> None:
        super().__init__(
            f"The model '{model[:128]}' does not exist or you do not have access to it. "
            "GET /v1/models lists what your key can use." + _how_to_scale(model),
            param=param,
        )


class ObjectUnknown(GatewayError):
    """No such object for this caller."""

    status, type, code = 404, "invalid_request_error", "not_found"


class RequestInvalid(GatewayError):
    """The body breaks a rule; `param` names the field."""

    status, type, code = 400, "invalid_request_error", "invalid_value"


class ContextLengthExceeded(RequestInvalid):
    """Prompt and answer together are longer than the model reads."""

    code = "context_length_exceeded"


class BodyTooLarge(GatewayError):
    """More bytes than this route takes."""

    status, type, code = 413, "invalid_request_error", "request_too_large"


class BodyTooSlow(GatewayError):
    """The client stopped sending in the middle of its request."""

    status, type, code = 408, "invalid_request_error", "request_timeout"


class NameTaken(GatewayError):
    """The name is in use."""

    status, type, code = 409, "invalid_request_error", "name_taken"


class ReplicaInSettings(GatewayError):
    """A replica of the settings is neither added nor removed at run time."""

    status, type, code = 409, "invalid_request_error", "replica_in_settings"


class PlanInUse(GatewayError):
    """A plan that tenants are on, or begin with, is not deleted."""

    status, type, code = 409, "invalid_request_error", "plan_in_use"


class KeyIsOver(GatewayError):
    """A key that is revoked or expired is not rotated."""

    status, type, code = 409, "invalid_request_error", "key_is_over"


class LastOperatorKey(GatewayError):
    """Without it nobody could administer anything any more."""

    status, type, code = 409, "invalid_request_error", "last_operator_key"


class TooManyKeys(GatewayError):
    """The tenant has as many live keys as one may have."""

    status, type, code = 409, "invalid_request_error", "too_many_keys"


class TooManyPins(GatewayError):
    """The tenant keeps as many adapters loaded as its plan lets it."""

    status, type, code = 409, "invalid_request_error", "too_many_pins"


class ProofMissing(GatewayError):
    """An alias moves only to a version that is proved, and this one waits for it."""

    status, type, code = 409, "invalid_request_error", "proof_missing"


class ProofFailed(GatewayError):
    """An alias moves only to a version that is proved, and this one is not."""

    status, type, code = 409, "invalid_request_error", "proof_failed"


class KeyReused(GatewayError):
    """An Idempotency-Key names one request."""

    status, type, code = 409, "invalid_request_error", "idempotency_key_reused"


class RateLimited(GatewayError):
    """The plan allows no more requests just now; types and codes are OpenAI's."""

    status, type, code = 429, "requests", "rate_limit_exceeded"

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: int | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message, param=param, retry_after_s=retry_after_s)
        self.headers = headers


class TokenRateLimited(RateLimited):
    """The plan allows no more tokens just now."""

    type = "tokens"


class QuotaSpent(RateLimited):
    """The month's tokens are spent."""

    type, code = "insufficient_quota", "insufficient_quota"


class RequestExceedsLimit(RateLimited):
    """One request asks for more tokens than the plan gives in a whole minute: a client must not try it again."""

    status, type, code = 400, "invalid_request_error", "request_exceeds_limit"


class ReplicaUnavailable(GatewayError):
    """No replica can answer now."""

    status, type, code = 503, "server_error", "engine_unavailable"


class TooBusy(GatewayError):
    """More requests wait than may, or this one has waited long enough."""

    status, type, code = 503, "server_error", "server_overloaded"


class TooManyWaiting(GatewayError):
    """As many requests of this tenant wait already as may."""

    status, type, code = 429, "requests", "too_many_waiting"


class TooManyStreams(GatewayError):
    """The tenant follows as many jobs at once as one may."""

    status, type, code = 429, "requests", "too_many_streams"


class UploadsUnderWay(GatewayError):
    """The tenant sends as much at once as it may; when that has ended there is room again."""

    status, type, code = 429, "requests", "uploads_under_way"


class TooManyLoads(GatewayError):
    """The tenant's requests have brought in as many cold adapters in this minute as its plan allows."""

    status, type, code = 429, "requests", "adapter_load_limit"


class ReplicaFailed(GatewayError):
    """A replica took the request and failed."""

    status, type, code = 502, "server_error", "engine_error"


class AdapterNotLoadable(GatewayError):
    """The adapter could not be brought into a replica."""

    status, type, code = 503, "server_error", "adapter_unavailable"


class AdapterQuarantined(AdapterNotLoadable):
    """The adapter is held back: an engine has come to harm with it."""

    code = "adapter_quarantined"

    def __init__(self, reason: str, until: int | None, *, now: float) -> None:
        what = "computed numbers that are none (NaN)" if reason == "corrupted" else "died"
        super().__init__(
            f"This adapter version is held back: an engine {what} with it. "
            + ("It may be tried again shortly." if until else "Publish another version, or ask the operator."),
            param="model",
            retry_after_s=None if until is None else max(1, round(until - now)),
        )
        if until is None:
            self.headers = ((b"x-should-retry", b"false"),)


@dataclass(frozen=True, slots=True)
class Answer:
    """How one class of the store's errors is told to a client."""

    status: int
    type: str
    code: str
    param: str | None = None
    retry_after_s: int | None = None


_FAULTY = "invalid_request_error"
_OURS = "server_error"
STORE_ANSWERS: Final[dict[type[store.AdapterStoreError], Answer]] = {
    store.AdapterNotFound: Answer(404, _FAULTY, "model_not_found", "model"),
    store.AdapterRejected: Answer(422, _FAULTY, "adapter_rejected"),
    store.OtherBaseModel: Answer(409, _FAULTY, "other_base_model", "model"),
    store.NameInvalid: Answer(400, _FAULTY, "name_invalid", "name"),
    store.NameReserved: Answer(409, _FAULTY, "name_reserved", "name"),
    store.AliasNotFound: Answer(404, _FAULTY, "alias_not_found", "alias"),
    store.AliasInvalid: Answer(400, _FAULTY, "alias_invalid", "alias"),
    store.FactorInvalid: Answer(400, _FAULTY, "factor_invalid", "factor"),
    store.AliasKept: Answer(409, _FAULTY, "alias_kept", "alias"),
    store.TooManyAliases: Answer(409, _FAULTY, "too_many_aliases", "alias"),
    store.NothingToRollBack: Answer(409, _FAULTY, "nothing_to_roll_back", "alias"),
    store.RolloutRunning: Answer(409, _FAULTY, "rollout_running", "alias"),
    store.RolloutInvalid: Answer(400, _FAULTY, "rollout_invalid"),
    store.RolloutNotFound: Answer(404, _FAULTY, "rollout_not_found"),
    store.RolloutOver: Answer(409, _FAULTY, "rollout_over"),
    store.PromptsInvalid: Answer(400, _FAULTY, "prompts_invalid", "prompts"),
    store.BundleTooLarge: Answer(413, _FAULTY, "adapter_too_large"),
    store.BundleIncomplete: Answer(400, _FAULTY, "adapter_incomplete"),
    store.QuotaExceeded: Answer(403, "insufficient_quota", "quota_exceeded"),
    store.ArchiveInvalid: Answer(400, _FAULTY, "archive_invalid"),
    store.ArchiveTruncated: Answer(400, _FAULTY, "archive_truncated"),
    store.ArchiveTooDense: Answer(413, _FAULTY, "archive_too_large"),
    store.MemberRefused: Answer(400, _FAULTY, "archive_member_refused"),
    store.UploadNotFound: Answer(404, _FAULTY, "not_found"),
    store.PartInvalid: Answer(400, _FAULTY, "part_invalid"),
    store.PartConflict: Answer(409, _FAULTY, "part_conflict"),
    store.PartsMissing: Answer(409, _FAULTY, "parts_missing"),
    store.ChecksumMismatch: Answer(409, _FAULTY, "checksum_mismatch"),
    store.TooManyUploads: Answer(409, _FAULTY, "too_many_uploads"),
    store.ImportInvalid: Answer(400, _FAULTY, "import_invalid"),
    store.BaseModelInvalid: Answer(500, _OURS, "internal_error"),
    store.VersionInUse: Answer(409, _FAULTY, "version_in_use", "force"),
    store.PermissionNotFound: Answer(404, _FAULTY, "not_found", "permission_id"),
    store.TooManyPermissions: Answer(409, _FAULTY, "too_many_permissions", "project_ids"),
    store.ErasureNotFound: Answer(404, _FAULTY, "not_found", "erasure"),
    store.SignatureInvalid: Answer(500, _OURS, "internal_error"),
    store.BlobCorrupt: Answer(503, _OURS, "adapter_unavailable", None, 60),
    store.StorageFull: Answer(507, _OURS, "storage_full", None, 60),
    store.StorageUnavailable: Answer(503, _OURS, "storage_unavailable", None, 5),
}
TRAINING_ANSWERS: Final[dict[type[training.TrainingError], Answer]] = {
    training.FileNotKnown: Answer(404, _FAULTY, "not_found", "file_id"),
    training.FileInvalid: Answer(400, _FAULTY, "invalid_training_file", "file"),
    training.TooManyChecks: Answer(503, _OURS, "server_overloaded", None, 60),
    training.FileTooLarge: Answer(413, _FAULTY, "file_too_large", "file"),
    training.FileInUse: Answer(409, _FAULTY, "file_in_use", "force"),
    training.FileDamaged: Answer(503, _OURS, "file_damaged", "file_id", 60),
    training.FileUploadNotKnown: Answer(404, _FAULTY, "not_found", "upload_id"),
    training.FileUploadOver: Answer(409, _FAULTY, "upload_over", "upload_id"),
    training.TooManyFileUploads: Answer(409, _FAULTY, "too_many_uploads"),
    training.PartNotKnown: Answer(400, _FAULTY, "part_unknown", "part_ids"),
    training.PartTooLarge: Answer(413, _FAULTY, "part_too_large", "data"),
    training.PartDamaged: Answer(409, _FAULTY, "part_damaged", "part_ids"),
    training.SizeDiffers: Answer(400, _FAULTY, "size_differs", "part_ids"),
    training.Md5Differs: Answer(400, _FAULTY, "checksum_mismatch", "md5"),
    training.FileUnfit: Answer(400, _FAULTY, "invalid_file_id"),
    training.JobNotFound: Answer(404, _FAULTY, "fine_tune_not_found", "fine_tune_id"),
    training.StateConflict: Answer(400, _FAULTY, "invalid_job_state", "fine_tune_id"),
    training.TooManyQueued: Answer(429, "requests", "job_queue_full"),
    training.LeaseLost: Answer(400, _FAULTY, "invalid_job_state", "fine_tune_id"),
    training.NotServable: Answer(400, _FAULTY, "not_servable"),
    training.OptionInvalid: Answer(400, _FAULTY, "invalid_value"),
}
_NO_RETRY: Final = ((b"x-should-retry", b"false"),)
"""For OpenAI's clients, which try again after each 429: a queue is not shorter a moment later."""
_HIDDEN: Final = {
    store.BlobCorrupt: "The adapter's stored files are damaged; publish it again or ask the operator.",
    store.BaseModelInvalid: "The server cannot read its base model; ask the operator.",
    store.StorageFull: "The server has no space left for this; nothing was kept. Try again later.",
    store.StorageUnavailable: "The server's storage does not answer just now; nothing was kept. Try again.",
}
"""Where the store's own text names files or devices, the client is told this instead."""


class Envelope(msgspec.Struct):
    """OpenAI's error object."""

    message: str
    type: str
    param: str | None
    code: str


class RejectedEnvelope(Envelope):
    """The same for a refused adapter: every fault, machine-readable."""

    faults: tuple[Fault, ...]


class InvalidFileEnvelope(Envelope):
    """The same for a training file that cannot be used: every line that is at fault, up to a cap."""

    faults: tuple[training.LineFault, ...]


class NotServableEnvelope(Envelope):
    """The same for a job whose result could not be served: the choice for `param` that could."""

    nearest: str | int | list[str]


class _Body(msgspec.Struct):
    error: Envelope


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """An error ready to be sent; headers as ASGI wants them."""

    status: int
    body: bytes
    headers: list[tuple[bytes, bytes]]


def envelope(error: GatewayError) -> bytes:
    """The JSON of one of our own errors."""
    return msgspec.json.encode(_Body(Envelope(error.message, error.type, error.param, error.own_code or error.code)))


def answer(error: Exception) -> ErrorAnswer:
    """The one place where an exception becomes a status and an envelope; the unforeseen is a bare 500."""
    if isinstance(error, GatewayError):
        return _answer(error.status, envelope(error), error.retry_after_s, error.headers)
    if isinstance(error, store.AdapterStoreError):
        return _store_answer(error)
    if isinstance(error, training.TrainingError):
        return _training_answer(error)
    return _answer(500, envelope(GatewayError("The server failed on this request; try again.")), None)


def _store_answer(error: store.AdapterStoreError) -> ErrorAnswer:
    if isinstance(error, store.AdapterNotFound):
        return answer(ModelUnknown(error.model))
    found = next(STORE_ANSWERS[kind] for kind in type(error).__mro__ if kind in STORE_ANSWERS)
    message = _HIDDEN.get(type(error), str(error))
    if isinstance(error, store.AdapterRejected):
        body = _Body(RejectedEnvelope(message, found.type, found.param, found.code, error.faults))
    else:
        param = error.quota if isinstance(error, store.QuotaExceeded) else found.param
        body = _Body(Envelope(message, found.type, param, found.code))
    return _answer(found.status, msgspec.json.encode(body), found.retry_after_s)


def _training_answer(error: training.TrainingError) -> ErrorAnswer:
    found = next(TRAINING_ANSWERS[kind] for kind in type(error).__mro__ if kind in TRAINING_ANSWERS)
    told = Envelope(str(error), found.type, found.param, found.code)
    if isinstance(error, training.FileInvalid):
        told = InvalidFileEnvelope(str(error), found.type, found.param, found.code, error.faults)
    elif isinstance(error, training.NotServable):
        told = NotServableEnvelope(str(error), found.type, error.param, found.code, error.nearest)
    elif isinstance(error, training.FileUnfit | training.OptionInvalid):
        told = Envelope(str(error), found.type, error.param, found.code)
    more = _NO_RETRY if isinstance(error, training.TooManyQueued) else ()
    return _answer(found.status, msgspec.json.encode(_Body(told)), found.retry_after_s, more)


def _answer(
    status: int, body: bytes, retry_after_s: int | None, more: tuple[tuple[bytes, bytes], ...] = ()
) -> ErrorAnswer:
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)), *more]
    if retry_after_s is not None:
        headers.append((b"retry-after", b"%d" % retry_after_s))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return ErrorAnswer(status, body, headers)


async def send_error(send: Send, error: Exception, *more_headers: tuple[bytes, bytes]) -> None:
    """A whole answer that tells of an error, as ASGI messages."""
    told = answer(error)
    await send({"type": "http.response.start", "status": told.status, "headers": [*told.headers, *more_headers]})
    await send({"type": "http.response.body", "body": told.body})


def authorization_of(scope: Scope) -> bytes | None:
    """The request's `Authorization` header; without one, its `x-api-key` as such a header would have it."""
    key_alone: bytes | None = None
    for name, value in scope["headers"]:
        if name == b"authorization":
            found: bytes = value
            return found
        if name == b"x-api-key" and key_alone is None:
            key_alone = value
    return None if key_alone is None else b"Bearer " + key_alone
