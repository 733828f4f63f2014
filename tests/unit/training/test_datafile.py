"""The check at upload: faults, figures and warnings of a whole file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training import datafile
from training.datafile import Finding, Report
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


def test_tokens_are_counted_by_role_and_by_what_is_trained(base: Path) -> None:
    """As the library counts each text; lengths are of whole rows."""
    tokenizer = datafile.load_tokenizer(base)
    words = [" ".join(["one"] * count) for count in range(8)]
    size = [len(tokenizer.encode(text, add_special_tokens=False).ids) for text in words]
    rows = [chat(words[3], words[1]), chat(words[5], words[2], words[1], words[4]), chat(words[1], words[7])]
    tokens = check(*rows, tokenizer=tokenizer).statistics.tokens
    assert tokens is not None
    assert tokens.by_role == {
        "user": sum(size[i] for i in (3, 5, 1, 1)),
        "assistant": sum(size[i] for i in (1, 2, 4, 7)),
    }
    assert tokens.total == sum(tokens.by_role.values())
    assert tokens.trained == tokens.by_role["assistant"]
    lengths = sorted([size[3] + size[1], size[5] + size[2] + size[1] + size[4], size[1] + size[7]])
    assert tokens.lengths == datafile.Lengths(lengths[0], lengths[1], lengths[2], lengths[2])


def test_answers_of_weight_0_are_not_trained(base: Path) -> None:
    """They are read, and so they count for the length."""
    messages = [USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT]
    tokens = check(
        json.dumps({"messages": messages}).encode(), tokenizer=datafile.load_tokenizer(base)
    ).statistics.tokens
    assert tokens is not None
    assert 2 * tokens.trained == tokens.by_role["assistant"]


def test_a_preference_is_as_long_as_its_prompt_with_the_longer_answer(base: Path) -> None:
    """Both answers are trained; calls and declarations of tools count as a template writes them."""
    tokenizer = datafile.load_tokenizer(base)

    def size(text: str) -> int:
        return len(tokenizer.encode(text, add_special_tokens=False).ids)

    tokens = check(preference("a b c", "d", "e f g h"), tokenizer=tokenizer).statistics.tokens
    assert tokens is not None
    assert tokens.trained == size("d") + size("e f g h")
    assert tokens.lengths == datafile.Lengths(*[size("a b c") + size("e f g h")] * 4)


def test_median_and_p95_are_rows_of_the_file(base: Path) -> None:
    """By nearest rank, of a hundred rows of 1 to 100 more tokens."""
    tokenizer = datafile.load_tokenizer(base)
    rows = [chat("?" * count, "!") for count in range(1, 101)]
    lengths = check(*rows, tokenizer=tokenizer).statistics.tokens
    counts = sorted(len(tokenizer.encode("?" * n, add_special_tokens=False).ids) + 1 for n in range(1, 101))
    assert lengths is not None
    assert lengths.lengths == datafile.Lengths(counts[0], counts[49], counts[94], counts[99])


def test_rows_to_look_at_are_told_by_line(base: Path) -> None:
    """Each kind once, with how many rows and which; the file is valid all the same."""
    rows = [
        chat("Who are you?", "Ann, ann@mail.example"),
        chat("a", "b"),
        chat("a", "b"),
        b"",
        chat("a", " \n"),
        chat("4111 1111 1111 1111", "+49 30 901820"),
        chat("long", "word " * 300),
        json.dumps({"messages": [USER, ASSISTANT]}).encode(),
        json.dumps({"messages": [dict(reversed(USER.items())), ASSISTANT], "tools": None}, indent=None).encode(),
    ]
    report = check(*rows, tokenizer=datafile.load_tokenizer(base), max_length=256)
    assert report.valid
    assert report.warnings == [
        Finding("duplicate", 2, [3, 9]),
        Finding("too_long", 1, [7]),
        Finding("blank_text", 1, [5]),
        Finding("blank_line", 1, [4]),
        Finding("email", 1, [1]),
        Finding("phone", 1, [6]),
        Finding("card", 1, [6]),
    ]
    assert str(report.warnings[0]) == "rows that are the same as an earlier one: 2 (line 3, 9)"


def test_a_warning_lists_the_first_lines_of_many() -> None:
    """And says how many there are."""
    (finding,) = check(*[chat("a", "b")] * 100).warnings
    assert (finding.kind, finding.count, finding.lines) == ("duplicate", 99, list(range(2, 22)))
    assert str(finding).startswith("rows that are the same as an earlier one: 99 (line 2, 3, 4, ")
    assert str(finding).endswith(", 21, …)")


def test_personal_data_in_a_call_is_seen_and_never_quoted() -> None:
    """Arguments are text too; a report has numbers of lines alone."""
    call = {"name": "mail", "arguments": json.dumps({"to": "ann.lee@mail.example"})}
    messages = [USER, {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": call}]}]
    report = check(json.dumps({"messages": messages}).encode())
    assert [finding.kind for finding in report.warnings] == ["email"]
    assert "ann" not in str(report)


def test_rows_of_the_validation_file_that_training_sees_are_told() -> None:
    """Whole rows, and rows that ask the same and answer otherwise; faults of either file are not this check's."""
    training = [chat("a", "b"), chat("c", "d"), b"x", chat("e", "f", "g", "h")]
    validation = [chat("new", "b"), chat("c", "other"), b"y", chat("a", "b"), chat("e", "f", "g", "h"), chat("e", "f")]
    found = datafile.leakage([b"\n".join(training)], [b"\n".join(validation)])
    assert found.findings == [Finding("same_row", 2, [4, 5]), Finding("same_prompt", 1, [2])]
    assert datafile.leakage([b"\n".join(training)], [chat("new", "b")]).findings == []


def test_a_preference_leaks_by_its_prompt() -> None:
    """The same question with other answers."""
    found = datafile.leakage([preference("a", "b", "c")], [preference("a", "x", "y")])
    assert found.findings == [Finding("same_prompt", 1, [1])]


def test_the_check_loads_no_training_library() -> None:
    """What takes uploads in must not pay for torch."""
    program = "import sys, training.datafile; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert {"torch", "transformers", "peft", "numpy", "tokenizers", "pydantic"} & set(loaded) == set()


MEASURED = """
import pathlib, sys
from training import datafile

def peak_kib():  # unlike ru_maxrss not the parent's, which a child inherits
    return int(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])

def data(mib, rows):
    for _ in range(mib):
        yield b"x" * (1 << 20)
    yield b"\\n"
    for number in range(rows):
        yield b'{"messages": [{"role": "user", "content": "%d"}, {"role": "assistant", "content": "b"}]}\\n' % number

datafile.check(data(1, 10))
before = peak_kib()
report = datafile.check(data(int(sys.argv[1]), int(sys.argv[2])))
assert report.statistics.examples == int(sys.argv[2]), report
print(peak_kib() - before)
"""


@pytest.mark.parametrize(
    ("mib", "rows", "limit_mib"), [(64, 4_000, 8), pytest.param(4_096, 1_000_000, 160, marks=pytest.mark.full)]
)
def test_memory_does_not_grow_with_the_file(mib: int, rows: int, limit_mib: int) -> None:
    """A line without end costs nothing, and a row less than its own bytes."""
    command = [sys.executable, "-c", MEASURED, str(mib), str(rows)]
    grown_kib = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown_kib < limit_mib * 1024


@given(st.lists(st.sampled_from([chat("a", "b"), chat("c", "d"), b"{}", b"", b"\xff", b"[", chat("a", " ")])))
def test_a_report_adds_up(lines: list[bytes]) -> None:
    """Every line is a row, a fault or blank."""
    report = datafile.check([b"".join(line + b"\n" for line in lines)])
    blank = sum(finding.count for finding in report.warnings if finding.kind == "blank_line")
    faulty = {fault.line for fault in report.faults} if any(line in (b"{}", b"\xff", b"[") for line in lines) else set()
    if report.complete:
        assert report.statistics.examples + len(faulty) + blank == len(lines) == report.statistics.lines
    assert report.valid == (len(report.faults) == 0 and report.statistics.examples > 0)
