"""A tenant's connection to a gateway: publishes folders as the HTTP API has it, and times the first token."""

import http.client
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

BOUNDARY: Final = "----tailor-store-benchmark"
END: Final = f"--{BOUNDARY}--\r\n".encode()
TIMEOUT_S: Final = 600.0
LOAD: Final = re.compile(r"\bload;dur=([0-9.]+)")


@dataclass(frozen=True, slots=True)
class Answer:
    """`sent_s`: from the request's first byte until the gateway had taken its last; `took_s`: to the answer's end."""

    status: int
    body: bytes
    took_s: float
    sent_s: float = 0.0
    load_s: float = 0.0
    """What the request waited for its adapter, as the gateway says."""

    def json(self) -> dict[str, Any]:
        members: dict[str, Any] = json.loads(self.body)
        return members


class Connection:
    """Kept alive; one request at a time."""

    def __init__(self, port: int, key: str) -> None:
        self._http = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        self._authorization = f"Bearer {key}"

    def close(self) -> None:
        self._http.close()

    def ask(self, method: str, path: str, body: Mapping[str, object] | None = None) -> Answer:
        """One small call."""
        begin = time.monotonic()
        self._send(method, path, body)
        with self._http.getresponse() as response:
            return Answer(response.status, response.read(), time.monotonic() - begin)

    def publish(self, name: str, files: Mapping[str, Path]) -> Answer:
        """`POST /v1/adapters` with the files, which the kernel sends: no copy of them is in this process."""
        pieces = [(_part_head(file), path) for file, path in files.items()]
        field = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="name"\r\n\r\n{name}\r\n'.encode()
        size = len(field) + sum(len(head) + path.stat().st_size + 2 for head, path in pieces) + len(END)
        begin = time.monotonic()
        self._http.putrequest("POST", "/v1/adapters")
        self._http.putheader("authorization", self._authorization)
        self._http.putheader("content-type", f"multipart/form-data; boundary={BOUNDARY}")
        self._http.putheader("content-length", str(size))
        self._http.endheaders(field)
        for head, path in pieces:
            self._http.send(head)
            with path.open("rb") as file:
                self._http.sock.sendfile(file)
            self._http.send(b"\r\n")
        self._http.send(END)
        sent = time.monotonic()
        with self._http.getresponse() as response:
            return Answer(response.status, response.read(), time.monotonic() - begin, sent - begin)

    def first_token(self, model: str) -> Answer:
        """A streamed chat request for one token; `took_s` to the event that carries it. The stream is read whole."""
        messages = [{"role": "user", "content": "Hi"}]
        asked = {"model": model, "stream": True, "max_tokens": 1, "temperature": 0, "messages": messages}
        begin = time.monotonic()
        first = 0.0
        self._send("POST", "/v1/chat/completions", asked)
        with self._http.getresponse() as response:
            body = b""
            for line in response:
                body += line
                if not first and _has_token(line):
                    first = time.monotonic() - begin
            load_ms = LOAD.search(response.headers.get("server-timing", ""))
            return Answer(
                response.status if first else 0, body, first, load_s=float(load_ms[1]) / 1e3 if load_ms else 0
            )

    def _send(self, method: str, path: str, body: Mapping[str, object] | None) -> None:
        headers = {"authorization": self._authorization, "content-type": "application/json"}
        self._http.request(method, path, None if body is None else json.dumps(body), headers)


def _part_head(name: str) -> bytes:
    disposition = f'content-disposition: form-data; name="{name}"; filename="{name}"'
    return f"--{BOUNDARY}\r\n{disposition}\r\ncontent-type: application/octet-stream\r\n\r\n".encode()


def _has_token(line: bytes) -> bool:
    """A token may have no text of its own: half a letter, or the end. The only one asked for ends the choice."""
    if not line.startswith(b"data: {"):
        return False
    choices = json.loads(line[6:]).get("choices", ())
    return any(choice.get("delta", {}).get("content") or choice.get("finish_reason") for choice in choices)


@contextmanager
def connected(port: int, key: str) -> Iterator[Connection]:
    """A connection, until the block ends."""
    connection = Connection(port, key)
    try:
        yield connection
    finally:
        connection.close()
