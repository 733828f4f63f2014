"""Recorded traffic of others: read into a recording, and written from one.

Prompts are hidden in all of these files: what is taken from them are times and lengths. Mooncake's and vLLM's
`hash_ids`, which say what prompts have in common, are not read; written, no two prompts have anything in common.
"""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

from loadtests.traces import Recording, Row, TraceInvalid, recording

BLOCK_TOKENS: Final = 512
"""What a hash id stands for in a Mooncake trace; vLLM is told by `--timed-trace-chunk-hash-size 512`."""
_AZURE: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT: Final = ("Timestamp", "Model", "Request tokens", "Response tokens", "Total tokens", "Log Type")
_EPOCH: Final = datetime(2026, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Format:
    """How one row of a file is read, None where it stands for a request that failed, and how rows are written."""

    about: str
    rows: Callable[[Iterable[str]], Iterator[dict[str, Any]]]
    read: Callable[[dict[str, Any]], Row | None]
    write: Callable[[Iterator[Row]], Iterator[str]]


def load(path: Path, form: str, *, from_s: float = -math.inf, until_s: float = math.inf) -> Recording:
    """The requests of a file between two times since its first, failed ones left out.

    Raises:
        TraceInvalid: it cannot be read, a row is not of the format, or nothing is left; the request is told.
    """
    kept: list[Row] = []
    first, read = None, 0
    try:
        with path.open(newline="") as lines:
            for told in FORMATS[form].rows(lines):
                row = FORMATS[form].read(told)
                read += 1
                if row is None:
                    continue
                first = row[0] if first is None else first
                if from_s <= row[0] - first < until_s:
                    kept.append((row[0], max(row[1], 1), row[2]))
    except (OSError, UnicodeError) as error:
        raise TraceInvalid(f"{path}: {error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise TraceInvalid(f"{path}: request {read + 1}: {error!r}. {form} is: {FORMATS[form].about}.") from error
    if not kept:
        raise TraceInvalid(f"{path}: no request in that time.")
    return recording(kept)


def dump(of: Recording, path: Path, form: str) -> None:
    """Writes a recording."""
    rows = zip(of.at_s.tolist(), of.prompt_tokens.tolist(), of.output_tokens.tolist(), strict=True)
    with path.open("w", newline="") as file:
        file.writelines(f"{line}\n" for line in FORMATS[form].write(rows))


def _objects(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    return map(json.loads, lines)


def _table(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    return iter(csv.DictReader(lines))


def _azure(told: dict[str, Any]) -> Row:
    at = datetime.fromisoformat(told[_AZURE[0]])
    since = (at if at.tzinfo else at.replace(tzinfo=UTC)) - _EPOCH
    return since.total_seconds(), int(told[_AZURE[1]]), int(told[_AZURE[2]])


def _to_azure(rows: Iterator[Row]) -> Iterator[str]:
    yield ",".join(_AZURE)
    for at_s, prompt, output in rows:
        yield f"{_EPOCH + timedelta(seconds=at_s):%Y-%m-%d %H:%M:%S.%f},{prompt},{output}"


def _burstgpt(told: dict[str, Any]) -> Row | None:
    output = int(told["Response tokens"])
    return (float(told["Timestamp"]), int(told["Request tokens"]), output) if output > 0 else None


def _to_burstgpt(rows: Iterator[Row]) -> Iterator[str]:
    yield ",".join(_BURSTGPT)
    for at_s, prompt, output in rows:
        yield f"{at_s:.6f},ChatGPT,{prompt},{output},{prompt + output},Conversation log"


def _mooncake(told: dict[str, Any]) -> Row:
    at_s, prompt, output = _vllm(told)
    return at_s / 1_000, prompt, output


def _to_mooncake(rows: Iterator[Row]) -> Iterator[str]:
    return _blocks((round(at_s * 1_000), prompt, output) for at_s, prompt, output in rows)


def _vllm(told: dict[str, Any]) -> Row:
    return float(told["timestamp"]), int(told["input_length"]), int(told["output_length"])


def _blocks(rows: Iterable[Row]) -> Iterator[str]:
    block = 0
    for at, prompt, output in rows:
        after = block + -(-prompt // BLOCK_TOKENS)
        told = {"timestamp": at, "input_length": prompt, "output_length": output, "hash_ids": [*range(block, after)]}
        block = after
        yield json.dumps(told)


FORMATS: Final = {
    "azure": Format(f"a CSV with {', '.join(_AZURE)}, times as in ISO 8601", _table, _azure, _to_azure),
    "burstgpt": Format("a CSV with Timestamp in s, Request tokens, Response tokens", _table, _burstgpt, _to_burstgpt),
    "mooncake": Format("JSONL with timestamp in ms, input_length, output_length", _objects, _mooncake, _to_mooncake),
    "vllm": Format("JSONL with timestamp in s, input_length, output_length, hash_ids", _objects, _vllm, _blocks),
}
"""Azure's LLM inference traces of 2023 and 2024, BurstGPT's, Mooncake's, and the timed trace of `vllm bench` 0.32."""
