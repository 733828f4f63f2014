"""What is known of one generation request at its end: read once by the metrics, the trace and the ledger."""

from typing import Final

from gateway.tokens import Usage

NOT_LOADED: Final = "cold"
"""The tier of an adapter whose load was waited for in vain."""


class Observation:
    """Filled by the hot path as a request goes. Moments are `time.monotonic()`, 0 where it never came so far.

    `status` is what the request came to: the answer's, but for a stream that broke off, which has the status that its
    error would have had in a head, and for a client that left, which is 499. `adapter_id` is empty for the base model.
    `queue_s` and `load_s` are all that it waited for places, those that it did not get among them; `tier` and `replica`
    are of the last engine that it was sent to, empty where it came to none.
    """

    __slots__ = (
        "adapter_id", "began", "cached_tokens", "completion_tokens", "ended", "first_at", "load_s", "placing_at",
        "prompt_tokens", "queue_s", "replica", "request_id", "route", "sent_at", "status", "streamed", "tenant_id",
        "tier", "version",
    )  # fmt: skip

    def __init__(self, route: str, began: float) -> None:  # a dataclass's own would stay interpreted
        self.route = route
        self.began = began
        self.request_id = ""
        self.tenant_id = ""
        self.adapter_id = ""
        self.version = 0
        self.replica = ""
        self.tier = ""
        self.streamed = False
        self.status = 0
        self.placing_at = 0.0
        self.queue_s = 0.0
        self.load_s = 0.0
        self.sent_at = 0.0
        self.first_at = 0.0
        self.ended = 0.0
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.completion_tokens = 0

    def take_usage(self, usage: Usage) -> None:
        """What the request has used."""
        self.prompt_tokens = usage.prompt_tokens
        self.completion_tokens = usage.completion_tokens or 0
        details = usage.prompt_tokens_details
        self.cached_tokens = (details.cached_tokens or 0) if details is not None else 0
