"""Recorded traffic: what is read from the files of others and written for them."""

from pathlib import Path

import numpy as np
import pytest

from loadtests import trace_formats, traces
from loadtests.traces import Recording, TraceInvalid

# as the published files begin, and as their readmes describe them
FILES = {
    "azure": """TIMESTAMP,ContextTokens,GeneratedTokens\r
2023-11-16 18:17:03.9799600,4808,10\r
2023-11-16 18:17:04.0319600,3180,8\r
2024-05-10 00:00:00.009930+00:00,110,27\r
""",
    "burstgpt": """Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type
5,ChatGPT,472,18,490,Conversation log
45,ChatGPT,1087,0,1087,Conversation log
118,GPT-4,417,276,693,API log
""",
    "mooncake": """{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}
{"timestamp": 30535, "input_length": 6472, "output_length": 26, "hash_ids": [46, 2353]}
""",
    "vllm": """{"timestamp": 61.114, "input_length": 521, "output_length": 132, "hash_ids": [1], "chat_id": 159}
{"timestamp": 60.5, "input_length": 0, "output_length": 1}
""",
}
REQUESTS = {
    "azure": [(0.0, 4_808, 10), (0.052, 3_180, 8), (15_140_576.03, 110, 27)],
    "burstgpt": [(0.0, 472, 18), (113.0, 417, 276)],
    "mooncake": [(0.0, 6_955, 52), (3.053, 6_472, 26)],
    "vllm": [(0.0, 1, 1), (0.614, 521, 132)],
}


def rows(of: Recording) -> list[tuple[float, int, int]]:
    """A recording as plain rows, times to the ms."""
    return [
        (round(float(at), 3), int(prompt), int(output))
        for at, prompt, output in zip(of.at_s, of.prompt_tokens, of.output_tokens, strict=True)
    ]


@pytest.mark.parametrize("form", FILES)
def test_published_traces_are_read(form: str, tmp_path: Path) -> None:
    """Times since the first request, in order; failed requests are left out, an empty prompt has one token."""
    file = tmp_path / "published"
    file.write_bytes(FILES[form].encode())
    assert rows(trace_formats.load(file, form)) == REQUESTS[form]


@pytest.mark.parametrize("form", FILES)
def test_what_is_written_is_read_back(form: str, tmp_path: Path) -> None:
    """Through each format and through the file of our own nothing is lost but digits beyond the ms."""
    random = np.random.default_rng(1)
    at = np.cumsum(random.exponential(0.3, 500))
    own = Recording(at - at[0], random.integers(1, 2_000, 500, np.int32), random.integers(1, 90, 500, np.int32))
    traces.write(own, tmp_path / "own.jsonl")
    trace_formats.dump(traces.read(tmp_path / "own.jsonl"), tmp_path / form, form)
    again = trace_formats.load(tmp_path / form, form)
    assert again.prompt_tokens.tolist() == own.prompt_tokens.tolist()
    assert again.output_tokens.tolist() == own.output_tokens.tolist()
    assert again.at_s == pytest.approx(own.at_s, abs=0.002)


def test_a_window_is_cut_out(tmp_path: Path) -> None:
    """Weeks of a trace need not be replayed: some seconds from some time on, which become 0."""
    file = tmp_path / "published"
    file.write_text(FILES["burstgpt"])
    cut = trace_formats.load(file, "burstgpt", from_s=100, until_s=120)
    assert rows(cut) == [(0.0, 417, 276)]
    with pytest.raises(TraceInvalid, match="no request"):
        trace_formats.load(file, "burstgpt", from_s=1_000)


@pytest.mark.parametrize(
    ("form", "text", "where"),
    [
        ("azure", FILES["burstgpt"], "request 1: KeyError"),
        ("mooncake", FILES["mooncake"] + "{}\n", "request 3: KeyError"),
        ("vllm", "no json\n", "request 1"),
    ],
)
def test_a_file_of_another_format_says_where(form: str, text: str, where: str, tmp_path: Path) -> None:
    """The first request that is not as the format has it, and how it should be."""
    file = tmp_path / "published"
    file.write_text(text)
    with pytest.raises(TraceInvalid, match=f"{where}.*{form} is:"):
        trace_formats.load(file, form)
