"""The store's figures and their bounds."""

import math
from collections.abc import Sequence
from typing import Final

from loadtests.figures import Bound, Row

BOUNDS: Final = {
    "list_page_cpu_ms": Bound(20, None, "lower", "CPU of a page of 100 adapters, ms"),
    "versions_page_cpu_ms": Bound(20, None, "lower", "CPU of an adapter with a page of 100 versions, ms"),
    "resolve_cpu_ratio": Bound(1.10, None, "lower", "CPU of a resolve by the database, 100,000 versions ÷ 100"),
    "publish_per_s": Bound(20, None, "higher", "small adapters published a second, folder storage"),
    "failed_publishes": Bound(0, None, "lower", "publishes that failed"),
    "upload_rss_mib": Bound(32, None, "lower", "resident memory that a 2 GB upload adds, MiB"),
    "upload_over_copy": Bound(0.7, None, "higher", "2 GB upload's throughput ÷ that of cp and sha256sum"),
    "inspection_cpu_s": Bound(1.5, None, "lower", "CPU of inspecting a 100 MB adapter, s: the dearest dtype"),
    "first_token_p95_s": Bound(3, None, "lower", "100 MB upload to first token, p95, folder storage, s"),
    "first_token_s3_p95_s": Bound(5, None, "lower", "100 MB upload to first token, p95, S3 on loopback, s"),
}


def row(figure: str, value: float, **detail: object) -> Row:
    """The verdict on a value."""
    return Row(figure, value, BOUNDS[figure], detail)


def percentile(values: Sequence[float], share: float) -> float:
    """The least of the values that so large a share of them does not exceed: a measured one, none in between."""
    return sorted(values)[math.ceil(share * len(values)) - 1]
