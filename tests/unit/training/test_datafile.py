"""The check at upload: faults, figures and warnings of a whole file."""

import json
from typing import Any

from training import datafile
from training.datafile import Report
from training.rows import MAX_FAULTS

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def chat(*texts: str, **more: object) -> bytes:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return json.dumps({"messages": messages, **more}).encode()


def preference(asked: str, better: str, worse: str) -> bytes:
    outputs = [[{"role": "assistant", "content": text}] for text in (better, worse)]
    given = {"messages": [{"role": "user", "content": asked}]}
    return json.dumps({"input": given, "preferred_output": outputs[0], "non_preferred_output": outputs[1]}).encode()


def check(*lines: bytes, **options: Any) -> Report:
    return datafile.check([b"\n".join(lines) + b"\n"], **options)


def test_a_good_file_is_described() -> None:
    """Rows, messages by role and bytes; nothing to warn of."""
    report = check(chat("a", "b"), chat("c", "d", "e", "f"))
    assert (report.valid, report.complete, report.method, report.warnings) == (True, True, "supervised", [])
    assert report.statistics.examples == report.statistics.lines == 2
    assert report.statistics.messages_by_role == {"user": 3, "assistant": 3}


def test_every_fault_is_told_with_its_line_up_to_a_cap() -> None:
    """And beyond the cap nothing is read."""
    report = check(chat("a", "b"), b"x", b"", b"{}")
    assert [fault.line for fault in report.faults] == [2, 4]
    many = check(*[b"x"] * 1_000)
    assert (len(many.faults), many.complete, many.statistics.lines) == (MAX_FAULTS, False, MAX_FAULTS)


def test_the_first_row_says_which_method_a_file_is_for() -> None:
    """Rows of the other are faults."""
    report = check(preference("a", "b", "c"), chat("a", "b"))
    assert report.method == "dpo"
    assert [(fault.line, fault.reason[:19]) for fault in report.faults] == [(2, "a row for 'supervis")]


def test_a_file_without_rows_is_a_fault() -> None:
    """Also where it has blank lines."""
    assert [str(fault) for fault in check(b"", b" ").faults] == ["line 1: the file holds no examples"]


def test_more_rows_than_allowed_end_the_reading() -> None:
    """One fault, at the first row too many."""
    report = check(*[chat("a", "b")] * 5, max_examples=3)
    assert [str(fault) for fault in report.faults] == ["line 4: more than 3 rows: split the file"]
    assert not report.complete
