"""What a load test asks of a server beside its load: the operator's and the tenants' calls."""

import json
from types import TracebackType
from typing import Any, Final, Self

import httpx

TIMEOUT_S: Final = 120.0


class ServerRefused(Exception):
    """A call that the server did not take; the text says which one and what it answered."""

    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


class ServerUnreachable(Exception):
    """Nobody answers at the address."""


class Api:
    """Calls to one server; the key is each call's own."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._http = httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT_S, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def call(
        self, key: str, method: str, path: str, body: object = None, *, files: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The answer's JSON; an empty one gives an empty object.

        Raises:
            ServerRefused: it was not taken. ServerUnreachable: nobody heard it.
        """
        sent: dict[str, Any] = {"files": files} if files is not None else {} if body is None else {"json": body}
        answer = await self._ask(key, method, path, **sent)
        told: dict[str, Any] = answer.json() if answer.content else {}
        return told

    async def text(self, url: str) -> str:
        """A page's text; empty where there is none."""
        try:
            answer = await self._http.get(url)
        except (httpx.TransportError, httpx.InvalidURL):
            return ""
        return answer.text if answer.status_code == 200 else ""

    async def answer(self, key: str, path: str, body: dict[str, Any]) -> tuple[str, str]:
        """A generated text, streamed or not, and the version that gave it.

        Raises:
            ServerRefused: there was none. ServerUnreachable: nobody heard it.
        """
        answer = await self._ask(key, "POST", path, json=body)
        events = _events(answer.text) if body.get("stream") else [answer.json()]
        return "".join(_said(event) for event in events), answer.headers.get("x-tailor-version", "")

    async def _ask(self, key: str, method: str, path: str, **sent: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        try:
            answer = await self._http.request(method, path, headers=headers, **sent)
        except httpx.TransportError as error:
            raise ServerUnreachable(f"{self.url} does not answer: {type(error).__name__} {error}".rstrip()) from error
        if answer.is_error:
            raise ServerRefused(f"{method} {path}: {answer.status_code} {_told(answer)}", answer.status_code)
        return answer


def _told(answer: httpx.Response) -> str:
    try:
        error = answer.json()["error"]
        return f"{error['code']}: {error['message']}"
    except (ValueError, KeyError, TypeError):
        return answer.text[:300]


def _events(text: str) -> list[dict[str, Any]]:
    data = (line[5:].strip() for line in text.splitlines() if line.startswith("data:"))
    return [json.loads(one) for one in data if one != "[DONE]"]


def _said(event: dict[str, Any]) -> str:
    choice = (event.get("choices") or [{}])[0]
    said = choice.get("text") or choice.get("delta") or choice.get("message") or ""
    return said if isinstance(said, str) else said.get("content") or ""
