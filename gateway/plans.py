"""Plans: what a tenant may use, and what share of a busy server is its own."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """Limits of every tenant on it; None is no limit. `weight` is its share of a busy server beside others'."""

    name: str = "default"
    weight: float = 1.0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None
    max_output_tokens: int | None = None
    max_prompt_bytes: int | None = None
    tokens_per_month: int | None = None
    loads_per_minute: int | None = None
