"""What is known of one generation request at its end: read once by the metrics, the trace and the ledger."""

from dataclasses import dataclass


@dataclass(slots=True)
class Observation:
    """Filled by the hot path as a request goes. Moments are `time.monotonic()`, 0 where it never came so far.

    `status` is what the request came to: the answer's, but for a stream that broke off, which has the status that its
    error would have had in a head, and for a client that left, which is 499. `adapter_id` is empty for the base model.
    """

    route: str
    began: float
    request_id: str = ""
    tenant_id: str = ""
    adapter_id: str = ""
    version: int = 0
    replica: str = ""
    tier: str = ""
    streamed: bool = False
    status: int = 0
    placing_at: float = 0.0
    queue_s: float = 0.0
    load_s: float = 0.0
    sent_at: float = 0.0
    first_at: float = 0.0
    ended: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
