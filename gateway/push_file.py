"""`tailor file put`: a training file to a gateway, a small one at once, a large one in parts."""

import uuid
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from gateway.api_client import ApiClient
from gateway.push import Advance, Counted, patiently, send_all

IN_PARTS_FROM_BYTES: Final = 64 << 20
PART_BYTES: Final = 16 << 20


class PushFile:
    """One file on its way; `stage` is told what is being done, and how many bytes there are to do."""

    def __init__(
        self,
        client: ApiClient,
        path: Path,
        *,
        stage: Callable[[str, int], Advance],
        purpose: str = "fine-tune",
        expires_after_s: int | None = None,
        in_parts_from_bytes: int = IN_PARTS_FROM_BYTES,
        part_bytes: int = PART_BYTES,
    ) -> None:
        self._client = client
        self._path = path
        self._stage = stage
        self._purpose = purpose
        self._expiry = None if expires_after_s is None else {"anchor": "created_at", "seconds": expires_after_s}
        self._in_parts_from_bytes = in_parts_from_bytes
        self._part_bytes = part_bytes
        self._key = {"idempotency-key": str(uuid.uuid4())}

    def run(self) -> Any:
        """The file as the server has it. Raises ApiError."""
        size_bytes = self._path.stat().st_size
        if size_bytes < self._in_parts_from_bytes:
            return patiently(lambda: self._at_once(size_bytes))
        return self._in_parts(size_bytes)

    def _at_once(self, size_bytes: int) -> Any:
        advance = self._stage("sending", size_bytes)
        policy = {f"expires_after[{name}]": str(value) for name, value in (self._expiry or {}).items()}
        with closing(Counted(self._path, advance)) as file:
            return self._client.call(
                "POST",
                "/v1/files",
                data={"purpose": self._purpose, **policy},
                files={"file": (self._path.name, file)},
                headers=self._key,
            )

    def _in_parts(self, size_bytes: int) -> Any:
        told = {
            "filename": self._path.name,
            "bytes": size_bytes,
            "mime_type": "application/jsonl",
            "purpose": self._purpose,
            "expires_after": self._expiry,
        }
        upload = patiently(lambda: self._client.call("POST", "/v1/uploads", told, headers=self._key))
        place = f"/v1/uploads/{upload['id']}"
        advance = self._stage("sending", size_bytes)

        def send(offset: int) -> str:
            with self._path.open("rb") as file:
                file.seek(offset)
                data = file.read(self._part_bytes)
            part_id = patiently(lambda: self._part(place, data))
            advance(len(data))
            return part_id

        part_ids = send_all(send, range(0, size_bytes, self._part_bytes))
        self._stage("checking", 0)
        return patiently(lambda: self._client.call("POST", f"{place}/complete", {"part_ids": part_ids}))["file"]

    def _part(self, place: str, data: bytes) -> str:
        sent = self._client.call("POST", f"{place}/parts", files={"data": data})
        part_id: str = sent["id"]
        return part_id
