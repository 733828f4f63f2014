"""`tailor eval` against served models: a fake replica's, and a server that is busy at first."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from gateway.api_client import ApiError
from gateway.cli import app as command
from gateway.served_evaluation import Asker, DataInvalid, Question, read
from tests.bad_adapters import write_good
from tests.integration.gateway.conftest import Gateway, Tenant


async def run(gateway: Gateway, tenant: Tenant, *arguments: str) -> Result:
    environment = {"TAILOR_URL": gateway.url, "TAILOR_API_KEY": tenant.key, "TAILOR_HOME": str(gateway.home.path)}
    return await asyncio.to_thread(CliRunner().invoke, command, ["eval", *arguments], env=environment)


def write(path: Path, answers: Sequence[str]) -> str:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hello"},
                {"role": "assistant", "content": "not this one", "weight": 0},
                {"role": "user", "content": f"question {number}"},
                {"role": "assistant", "content": answer},
            ]
        }
        for number, answer in enumerate(answers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


async def test_a_served_model_is_scored_and_compared(gateway: Gateway, acme: Tenant, tmp_path: Path) -> None:
    """Status 3 where it is worse than another by more than chance, 0 where it is not, a table of classes beside it."""
    for seed in (1, 2):
        await acme.publish(write_good(tmp_path / f"v{seed}", seed=seed))
    said = [(await acme.ask(f"bot@{n}")).json()["choices"][0]["message"]["content"] for n in (1, 2)]
    data = write(tmp_path / "data.jsonl", [said[0]] * 9 + [said[1]])
    done = await run(gateway, acme, data, "--model", "bot@1", "--against", "bot@2")
    assert done.exit_code == 0, done.output
    assert "exact match 0.900 of 10" in done.stdout
    assert "not worse by more than chance" in done.stdout
    worse = await run(gateway, acme, data, "--model", "bot@2", "--base", "bot@1", "--json", "--concurrency", "3")
    assert worse.exit_code == 3, worse.output
    told = json.loads(worse.stdout)
    assert [told["models"][f"bot@{n}"]["exact_match"] for n in (1, 2)] == [0.9, 0.1]
    assert told["regression"]["is_regression"] is True
    missing = await run(gateway, acme, data, "--model", "bot@9")
    assert missing.exit_code == 1
    assert "model_not_found" in missing.stderr
    (tmp_path / "data.jsonl").write_text('{"messages": []}\n{}\n')
    faulty = await run(gateway, acme, data, "--model", "bot@1")
    assert faulty.exit_code == 1
    assert "line 1" in faulty.stderr
    assert "line 2" in faulty.stderr


def test_what_is_asked_are_the_messages_before_the_last_answer(tmp_path: Path) -> None:
    """As they were written, without the weights of training; of a pair the better answer is expected."""
    write(tmp_path / "data.jsonl", ["a"])
    (question,) = read(tmp_path / "data.jsonl")
    assert question.expected == "a"
    assert [message["content"] for message in question.body["messages"]] == ["hello", "not this one", "question 0"]
    assert all("weight" not in message for message in question.body["messages"])
    asked = [{"role": "user", "content": "hi"}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("good", "bad"))
    pair = {"input": {"messages": asked}, "preferred_output": good, "non_preferred_output": bad}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    assert read(tmp_path / "pairs.jsonl") == [Question({"messages": asked}, "good")]
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataInvalid, match="no examples"):
        read(tmp_path / "empty.jsonl")


async def test_who_is_told_to_wait_waits_and_no_more_are_asked_at_once_than_said() -> None:
    """A 429 is asked again after its `Retry-After`; another refusal is told."""
    busy, running, most, status = 3, 0, 0, 200

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal busy, running, most
        while head := await reader.readuntil(b"\r\n\r\n") if not reader.at_eof() else b"":
            length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
            asked = json.loads(await reader.readexactly(length))
            running, most = running + 1, max(most, running + 1)
            await asyncio.sleep(0)
            running -= 1
            busy -= 1
            code = 429 if busy >= 0 else status
            text = asked["messages"][-1]["content"]
            body = json.dumps(
                {"choices": [{"message": {"content": text}}], "error": {"message": "no", "code": "refused"}}
            ).encode()
            writer.write(b"HTTP/1.1 %d X\r\nretry-after: 0\r\ncontent-length: %d\r\n\r\n%b" % (code, len(body), body))

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await serve(reader, writer)
        except asyncio.IncompleteReadError:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        asker = Asker(f"http://127.0.0.1:{port}", "sk-x", concurrency=2, max_tokens=5)
        questions = [Question({"messages": [{"role": "user", "content": str(n)}]}, "") for n in range(20)]
        assert await asker.answers("bot", questions) == [str(n) for n in range(20)]
        assert busy < 0
        assert 1 <= most <= 2
        status = 400
        with pytest.raises(ApiError, match=r"no \[400 refused\]"):
            await asker.answers("bot", questions)
