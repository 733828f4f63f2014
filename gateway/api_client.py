"""What the `tailor` command says to a gateway, over HTTP like everybody else."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import httpx


class ApiError(Exception):
    """The gateway refused, or does not answer; the text is for the person at the terminal."""

    def __init__(self, message: str, *, status: int | None = None, body: Any = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = body


class ApiClient:
    """One gateway, one key."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url.rstrip("/")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=self.url, headers=headers, timeout=httpx.Timeout(300, connect=5))

    def call(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        """The decoded answer; None where it is empty.

        Raises:
            ApiError: the gateway's own words, or that it cannot be reached.
        """
        try:
            response = self._http.request(method, path, json=body, **options)
        except httpx.TransportError as error:
            raise self._away(error) from error
        if response.is_error:
            raise _refused(response.status_code, response.content)
        return response.json() if response.content else None

    def download(self, path: str, target: BinaryIO) -> None:
        """Writes the answer's body to `target` as it comes.

        Raises:
            ApiError: as `call`, or that it broke off.
        """
        try:
            with self._http.stream("GET", path) as response:
                if response.is_error:
                    raise _refused(response.status_code, response.read())
                for piece in response.iter_bytes():
                    target.write(piece)
        except httpx.RemoteProtocolError as error:
            raise ApiError("The file broke off before its end: what is stored of it may be damaged.") from error
        except httpx.TransportError as error:
            raise self._away(error) from error

    def close(self) -> None:
        self._http.close()

    def chat(self, model: str, text: str, **parameters: Any) -> Iterator[str]:
        """The pieces of a streamed answer.

        Raises:
            ApiError: before or in the middle of it.
        """
        body = {"model": model, "messages": [{"role": "user", "content": text}], "stream": True, **parameters}
        try:
            with self._http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.is_error:
                    raise _refused(response.status_code, response.read())
                yield from _pieces(response.iter_lines())
        except httpx.TransportError as error:
            raise self._away(error) from error

    def _away(self, error: httpx.TransportError) -> ApiError:
        return ApiError(
            f"No gateway answers at {self.url} ({type(error).__name__}): start one with `tailor up`, or set TAILOR_URL."
        )


def _pieces(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        if not line.startswith("data: ") or line == "data: [DONE]":
            continue
        event = json.loads(line[6:])
        if "error" in event:
            raise ApiError(event["error"]["message"], body=event)
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""


def _refused(status: int, content: bytes) -> ApiError:
    try:
        body = json.loads(content)
        error = body["error"]
        message = f"{error['message']} [{status} {error['code']}]"
    except (ValueError, KeyError, TypeError):
        return ApiError(f"The gateway answered {status}.", status=status)
    return ApiError(message + listed(error.get("faults", ())), status=status, body=body)


def listed(faults: Iterable[Mapping[str, str]]) -> str:
    """A line for each fault of a refused adapter, or of a training file."""
    lines = ""
    for fault in faults:
        if "reason" in fault:
            lines += f"\n  line {fault['line']}: {fault['reason']}"
            continue
        lines += f"\n  {fault['code']}: {fault['where']}: found {fault['found']}, expected {fault['expected']}"
        lines += f" ({fault['hint']})" if fault["hint"] else ""
    return lines
