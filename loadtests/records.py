"""What a generator process writes down: packed rows and chunk times, no object a request; merging those of several."""

import re
import struct
from array import array
from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

from loadtests.client import Exchange
from loadtests.recording import ABSENT, SAMPLE, TIERS, Array, Outcome, Samples

_ROW: Final = struct.Struct("<Iqqqqqqqh2BI9i")
assert _ROW.size == SAMPLE.itemsize
_TIMING: Final = re.compile(rb'(\w+);(?:dur=([\d.]+)|desc="([a-z]+)")')
_TEXTS: Final = ("version", "replica", "answer", "error")


class Records:
    """Grows by a row a request."""

    def __init__(self) -> None:
        self._rows = bytearray()
        self._chunk_at = array("I")
        self._texts: dict[str, int] = {"": 0}
        self._told_rows = self._told_chunks = 0

    def add(self, exchange: Exchange, index: int, begin: int) -> None:
        """Write down what became of it; `begin` is where its times count from."""
        scheduled = exchange.sent if exchange.scheduled == ABSENT else exchange.scheduled
        usage, kept = exchange.usage, exchange.kept
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", ABSENT) if usage else ABSENT
        timing = kept.get(b"server-timing")
        tier, queue_us, load_us = read_timing(timing) if timing is not None else (0, ABSENT, ABSENT)
        times = [
            ABSENT if at == ABSENT else at - begin
            for at in (
                scheduled,
                exchange.sent,
                exchange.headers,
                exchange.first,
                exchange.first if exchange.token == ABSENT else exchange.token,
                exchange.last,
                exchange.done,
            )
        ]
        self._rows += _ROW.pack(
            index,
            *times,
            exchange.status,
            exchange.outcome,
            tier,
            len(exchange.chunk_at),
            usage.get("prompt_tokens", ABSENT),
            usage.get("completion_tokens", ABSENT),
            ABSENT if cached is None else cached,
            queue_us,
            load_us,
            self._text(kept.get(b"x-tailor-version", b"").decode("latin-1")),
            self._text(kept.get(b"x-tailor-replica", b"").decode("latin-1")),
            self._text("".join(exchange.answer)) if exchange.keeps_answer and exchange.status == 200 else ABSENT,
            self._text(exchange.error),
        )
        self._chunk_at.extend(exchange.chunk_at)

    def _text(self, text: str) -> int:
        return self._texts.setdefault(text, len(self._texts))

    def since_last(self) -> tuple[Array, Array]:
        """Rows and chunk times that came since it was last called."""
        rows = np.frombuffer(bytes(self._rows[self._told_rows * SAMPLE.itemsize :]), SAMPLE)
        chunk_at = np.array(self._chunk_at[self._told_chunks :], np.uint32)
        self._told_rows += len(rows)
        self._told_chunks += len(chunk_at)
        return rows, chunk_at

    def samples(self, indices: Array) -> Samples:
        """All, and rows of UNSENT for those of `indices` (of the schedule) that never had their turn."""
        rows = np.frombuffer(bytes(self._rows), SAMPLE)
        unsent = np.setdiff1d(indices, rows["index"])
        missing = np.zeros(len(unsent), SAMPLE)
        for name in SAMPLE.names or ():
            if name not in ("tier", "chunks", "error", "version", "replica"):
                missing[name] = Outcome.UNSENT if name == "outcome" else ABSENT if name != "index" else unsent
        chunk_at = np.array(self._chunk_at, np.uint32)
        return in_order(np.concatenate((rows, missing)), chunk_at, tuple(self._texts))


def read_timing(header: bytes) -> tuple[int, int, int]:
    """Tier and µs of queueing and of loading, as `server-timing` tells them."""
    found = {name: duration or text for name, duration, text in _TIMING.findall(header)}
    tier = found.get(b"adapter", b"").decode()
    microseconds = (round(float(found[name]) * 1_000) if found.get(name) else ABSENT for name in (b"queue", b"load"))
    return (TIERS.index(tier) if tier in TIERS else 0, *microseconds)  # type: ignore[return-value]


def in_order(rows: Array, chunk_at: Array, texts: tuple[str, ...]) -> Samples:
    """Rows in order of their index, each still with its own chunks."""
    order = np.argsort(rows["index"], kind="stable")
    counts: npt.NDArray[np.int64] = rows["chunks"].astype(np.int64)
    begins = np.cumsum(counts) - counts
    sorted_counts, sorted_begins = counts[order], begins[order]
    ends = np.cumsum(sorted_counts)
    places = np.arange(len(chunk_at)) + np.repeat(sorted_begins - (ends - sorted_counts), sorted_counts)
    return Samples(rows[order], ends.astype(np.uint64), chunk_at[places], texts)


def merged(parts: Sequence[Samples]) -> Samples:
    """Those of several processes or hosts as one."""
    texts: dict[str, int] = {"": 0}
    rows = []
    for part in parts:
        number = np.array([texts.setdefault(text, len(texts)) for text in part.texts], np.int32)
        own = part.rows.copy()
        for name in _TEXTS:
            told = own[name] != ABSENT
            own[name][told] = number[own[name][told]]
        rows.append(own)
    chunk_at = np.concatenate([part.chunk_at for part in parts]) if parts else np.empty(0, np.uint32)
    return in_order(np.concatenate(rows) if rows else np.empty(0, SAMPLE), chunk_at, tuple(texts))
