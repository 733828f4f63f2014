"""Asks any served model the questions of a data file, over the chat API like everybody else, for `tailor eval`."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx

from gateway.api_client import ApiError
from training.rows import MAX_FAULTS, Fault, Method, RowInvalid, numbered_lines, parse_line

READ_BYTES: Final = 1 << 16
MOST_TRIES: Final = 8
LONGEST_WAIT_S: Final = 60.0
TIMEOUT_S: Final = 300.0
AGAIN: Final = frozenset({429, 502, 503, 504})


class DataInvalid(Exception):
    """Lines of the data file are no examples."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked, as the chat API takes it, and the answer that is expected."""

    body: dict[str, Any]
    expected: str


def read(path: Path) -> list[Question]:
    """The last answer of each example; of pairs the better one. Raises DataInvalid with every faulty line."""
    questions: list[Question] = []
    faults: list[Fault] = []
    with path.open("rb") as file:
        for number, line in numbered_lines(iter(lambda: file.read(READ_BYTES), b"")):
            if not line.strip() or len(faults) == MAX_FAULTS:
                continue
            try:
                questions.append(_question(number, line))
            except RowInvalid as error:
                faults.append(Fault(number, str(error)))
    if faults:
        raise DataInvalid("\n".join([f"{path} has {len(faults)} faulty lines:", *map(str, faults)]))
    if not questions:
        raise DataInvalid(f"{path} holds no examples.")
    return questions


def _question(number: int, line: bytes) -> Question:
    method: Method = "dpo" if b'"preferred_output"' in line else "supervised"
    parse_line(number, line, method)  # only to check it: what is asked are the messages as they were written
    row = json.loads(line.decode("utf-8-sig"))
    given = row["input"] if method == "dpo" else row
    messages = [*given["messages"], *row.get("preferred_output", ())]
    last = max(at for at, message in enumerate(messages) if message["role"] == "assistant")
    expected = messages[last].get("content")
    if not isinstance(expected, str):
        raise RowInvalid("the last answer is no text: calls of tools and parts cannot be compared")
    asked = [{name: value for name, value in one.items() if name != "weight"} for one in messages[:last]]
    return Question({"messages": asked, **({"tools": given["tools"]} if given.get("tools") else {})}, expected)


class Asker:
    """One gateway and one key, so many questions at a time."""

    def __init__(self, url: str, key: str, *, concurrency: int, max_tokens: int | None) -> None:
        self._url = url.rstrip("/")
        self._key = key
        self._places = asyncio.Semaphore(concurrency)
        self._max_tokens = max_tokens

    async def answers(
        self, model: str, questions: Sequence[Question], on_answer: Callable[[], None] = lambda: None
    ) -> list[str]:
        """In the order of the questions, each answered greedily. Raises ApiError: the first that is refused."""
        async with self._client() as client:
            asked = [asyncio.create_task(self._answer(client, model, one, on_answer)) for one in questions]
            try:
                return list(await asyncio.gather(*asked))
            finally:
                for task in asked:
                    task.cancel()

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[httpx.AsyncClient]:
        headers = {"authorization": f"Bearer {self._key}"}
        async with httpx.AsyncClient(
            base_url=self._url, headers=headers, timeout=httpx.Timeout(TIMEOUT_S, connect=5)
        ) as client:
            yield client

    async def _answer(
        self, client: httpx.AsyncClient, model: str, question: Question, on_answer: Callable[[], None]
    ) -> str:
        body = {**question.body, "model": model, "temperature": 0}
        if self._max_tokens is not None:
            body["max_tokens"] = self._max_tokens
        async with self._places:
            response = await self._sent(client, body)
        on_answer()
        return str(response.json()["choices"][0]["message"].get("content") or "")

    async def _sent(self, client: httpx.AsyncClient, body: dict[str, Any]) -> httpx.Response:
        """Again where the gateway is busy, when it says so. Raises ApiError."""
        for turn in range(1, MOST_TRIES + 1):
            try:
                response = await client.post("/v1/chat/completions", json=body)
            except httpx.TransportError as error:
                raise ApiError(f"No gateway answers at {self._url} ({type(error).__name__}).") from error
            if response.status_code not in AGAIN or turn == MOST_TRIES:
                break
            await asyncio.sleep(_wait_s(response, turn))
        if response.is_error:
            raise ApiError(_told(response), status=response.status_code)
        return response


def _wait_s(response: httpx.Response, turn: int) -> float:
    asked = response.headers.get("retry-after", "")
    return min(LONGEST_WAIT_S, float(asked) if asked.isdecimal() else 0.25 * 2**turn)


def _told(response: httpx.Response) -> str:
    try:
        error = response.json()["error"]
        return f"{error['message']} [{response.status_code} {error['code']}]"
    except (ValueError, KeyError, TypeError):
        return f"The gateway answered {response.status_code}."
