import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training import dataset, rows
from training.dataset import IGNORED, DatasetInvalid, NoGenerationMask

USER = {"role": "user", "content": "Hi"}
ASSISTANT = {"role": "assistant", "content": "Hello"}


def row(*messages: object, **more: object) -> bytes:
    return json.dumps({"messages": list(messages), **more}).encode()


GOOD = row(USER, ASSISTANT)


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path


def faults(path: Path, tokenizer: PreTrainedTokenizerFast, max_length: int = 512) -> list[tuple[int, str]]:
    with pytest.raises(DatasetInvalid) as caught:
        dataset.load(path, tokenizer, max_length=max_length)
    return [(fault.line, fault.reason) for fault in caught.value.faults]


def labelled(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], *weights: int) -> list[str]:
    """Each token of the chat, in brackets where it is trained."""
    tokens = dataset.tokenize(tokenizer, messages, weights or None)
    names = tokenizer.convert_ids_to_tokens(tokens.input_ids)
    assert all(label in (IGNORED, token) for token, label in zip(tokens.input_ids, tokens.labels, strict=True))
    return [f"[{n}]" if label != IGNORED else n for n, label in zip(names, tokens.labels, strict=True)]


def test_labels_stand_on_the_answer_and_its_end_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    """Of a chat only what the assistant writes is trained, its end-of-turn token included."""
    messages = [
        {"role": "system", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": "c"},
    ]
    assert labelled(tokenizer, messages) == [
        *("<|bos|>", "<|system|>", "a", "<|end|>", "<|user|>", "b", "<|end|>", "<|assistant|>", "[c]", "[<|end|>]")
    ]


def test_a_turn_of_weight_0_is_not_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    """Weights choose among the assistant's turns, each with its own end-of-turn token."""
    chat = [
        USER | {"content": "a"},
        ASSISTANT | {"content": "b"},
        USER | {"content": "c"},
        ASSISTANT | {"content": "d"},
    ]
    assert labelled(tokenizer, chat, 0, 1) == [
        *("<|bos|>", "<|user|>", "a", "<|end|>", "<|assistant|>", "b", "<|end|>"),
        *("<|user|>", "c", "<|end|>", "<|assistant|>", "[d]", "[<|end|>]"),
    ]


def test_two_assistant_turns_in_a_row_keep_their_own_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    """Neighbouring turns are told apart by the template's blocks, not by the text between them."""
    chat = [USER | {"content": "a"}, ASSISTANT | {"content": "b"}, ASSISTANT | {"content": "c"}]
    assert labelled(tokenizer, chat, 1, 0)[4:] == ["<|assistant|>", "[b]", "[<|end|>]", "<|assistant|>", "c", "<|end|>"]


def test_letters_of_several_bytes_are_trained_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    """All byte tokens of one letter share its place in the text, so all of them get labels."""
    tokens = dataset.tokenize(tokenizer, [USER, {"role": "assistant", "content": "東🦊"}])
    trained = [label for label in tokens.labels if label != IGNORED]
    assert tokenizer.decode(trained) == "東🦊<|end|>"


def test_labels_agree_with_transformers_own_mask(tokenizer: PreTrainedTokenizerFast) -> None:
    """Where all weights are 1, the labels are those that transformers' assistant mask would give."""
    chat = [USER, ASSISTANT, {"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "7, Ann"}]
    oracle = tokenizer.apply_chat_template(chat, return_assistant_tokens_mask=True, return_dict=True)
    tokens = dataset.tokenize(tokenizer, chat)
    assert tokens.input_ids == oracle["input_ids"]
    assert [int(label != IGNORED) for label in tokens.labels] == oracle["assistant_masks"]


def test_a_template_without_generation_blocks_is_refused(base: Path, tmp_path: Path) -> None:
    """Without the mask nothing says what to train on, so the base is named as the fault, not the data."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = tokenizer.chat_template.replace("{%- generation %}", "").replace(
        "{%- endgeneration %}", ""
    )
    with pytest.raises(NoGenerationMask, match=r"no \{% generation %\} block"):
        dataset.load(write(tmp_path / "data.jsonl", GOOD), tokenizer, max_length=512)


def test_good_lines_become_rows_in_order(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Blank lines, a byte order mark, Windows line ends and a missing last line end are all fine."""
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\n" + row(USER, ASSISTANT | {"content": "Bye"}))
    texts = [tokenizer.decode(tokens.input_ids) for tokens in dataset.load(path, tokenizer, max_length=512)]
    assert [text.endswith(end) for text, end in zip(texts, ("Hello<|end|>", "Bye<|end|>"), strict=True)] == [True, True]


def test_a_line_separator_inside_a_text_does_not_end_the_line(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Only a newline ends a line; U+2028 in a text is text."""
    line = json.dumps({"messages": [USER, ASSISTANT | {"content": "a\u2028b"}]}, ensure_ascii=False).encode()
    assert len(dataset.load(write(tmp_path / "data.jsonl", line), tokenizer, max_length=512)) == 1


BAD_LINES: dict[str, tuple[bytes, str]] = {
    "not json": (b"{nope", "not JSON that can be read: Expecting property name"),
    "unknown role": (row({"role": "critic", "content": "x"}, ASSISTANT), "messages[0].role is 'critic', not one of"),
    "nothing to learn": (row(USER, ASSISTANT | {"weight": 0}), "every assistant message has weight 0"),
    "a preference": (b'{"input": {}}', "a row for 'dpo' in a file for 'supervised'"),
    "too many tokens": (row(USER, ASSISTANT | {"content": "xyz " * 600}), "but max_length is 512: shorten or split it"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_is_named_with_its_reason(
    line: bytes, reason: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A fault carries the number of its line, and its neighbours are read all the same."""
    (number, told), (last, _) = faults(write(tmp_path / "data.jsonl", GOOD, line, GOOD, b"x"), tokenizer)
    assert (number, last) == (2, 4)
    assert reason in told


def test_all_faults_come_at_once_and_in_order(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Faults of parsing and of tokenising are reported together, sorted by line."""
    path = write(tmp_path / "data.jsonl", row(USER, ASSISTANT | {"content": "x " * 600}), b"x", GOOD, b"{}")
    assert [line for line, _ in faults(path, tokenizer)] == [1, 2, 4]


def test_faults_are_capped(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A file that is wrong throughout does not give a list without end, and says so."""
    path = write(tmp_path / "data.jsonl", *[b"x"] * 1_000)
    with pytest.raises(DatasetInvalid, match="only the first are listed") as caught:
        dataset.load(path, tokenizer, max_length=512)
    assert len(caught.value.faults) == rows.MAX_FAULTS


def test_an_empty_file_is_a_fault(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """No examples is no data."""
    assert faults(write(tmp_path / "data.jsonl", b""), tokenizer) == [(1, "the file holds no examples")]


def test_messages_that_the_template_refuses_are_a_fault_of_their_line(base: Path, tmp_path: Path) -> None:
    """A template's own rules (here: no system message) are told with the line that breaks them."""
    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = tokenizer.chat_template.replace("('system', 'user')", "('user',)")
    path = write(tmp_path / "data.jsonl", GOOD, row({"role": "system", "content": "x"}, USER, ASSISTANT))
    assert faults(path, tokenizer) == [(2, "the base's chat template refuses these messages: unknown role: system")]
